import json
import subprocess
import sys

import numpy as np
import pytest

import segformer3d
from segformer3d.config import (
    IMAGENET_PREPROCESSING,
    METRIC_DEPTH,
    MIT_SIZES,
    ORIGIN_DEPTH,
    ORIGIN_PREPROCESSING,
    DepthCodec,
    ModelConfig,
    Preprocessing,
    WeightsInfo,
    mit_size,
    mit_variant,
)


def test_importing_the_package_and_its_config_needs_no_torch():
    code = (
        "import sys, segformer3d, segformer3d.config; dir(segformer3d); segformer3d.ModelConfig();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exported_names():
    assert segformer3d.__all__ == sorted(segformer3d.__all__)
    assert dir(segformer3d) == segformer3d.__all__
    for name in segformer3d.__all__:
        assert getattr(segformer3d, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = segformer3d.nothing


def test_mit_sizes_are_those_of_the_paper():
    assert {name: sum(size.depths) for name, size in MIT_SIZES.items()} == {
        "mit_b0": 8,
        "mit_b1": 8,
        "mit_b2": 16,
        "mit_b3": 28,
        "mit_b4": 41,
        "mit_b5": 52,
    }
    assert MIT_SIZES["mit_b0"].embed_dims == (32, 64, 160, 256)
    assert MIT_SIZES["mit_b5"].embed_dims == (64, 128, 320, 512)
    assert [size.paper_head_width for size in MIT_SIZES.values()] == [256, 256, 768, 768, 768, 768]


@pytest.mark.parametrize("variant", [*MIT_SIZES, "mit:16,32,80,128:1,2,2,1"])
def test_mit_variant_names_its_size(variant):
    size = mit_size(variant)
    assert mit_variant(size.embed_dims, size.depths) == variant


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "mit_b6"}, "unknown model variant 'mit_b6'"),
        ({"variant": "mit:16,32,80:1,1,1,1"}, "unknown model variant"),
        ({"variant": "mit:16,32,81,128:1,1,1,1"}, "81 does not divide into 5 heads"),
        ({"variant": "mit:16,32,80,128:1,0,1,1"}, "at least one block"),
        ({"head_width": 0}, "head_width"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 256}, "num_classes"),
        ({"num_classes": None, "has_depth": False}, "at least one head"),
    ],
)
def test_model_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "finite"),
        ({"std": (0.2, 0.2, 0.0)}, "positive"),
        ({"channel_order": "rbg"}, "rgb or bgr"),
    ],
)
def test_preprocessing_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "disparity"}, "metric or relative"),
        ({"kind": "relative", "scale": 0.0}, "positive"),
        ({"kind": "metric", "scale": 100.0}, "always metres"),
        ({"kind": "metric", "absolute_value": True}, "always metres"),
    ],
)
def test_depth_codec_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        DepthCodec(**fields)


def test_metric_depth_is_metres_times_256():
    depth = np.array([[1.0, 0.5, 255.99], [80.0, 1e-6, 300.0]], np.float32)
    codes = METRIC_DEPTH.encode(depth)
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes, [[256, 128, 65533], [20480, 1, 65535]])
    decoded = METRIC_DEPTH.decode(codes)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded[0], depth[0], atol=0.5 / 256)


def test_invalid_depth_is_zero_and_decodes_to_nan():
    depth = np.array([0.0, -1.0, np.nan, np.inf, -np.inf], np.float64)
    assert METRIC_DEPTH.encode(depth).tolist() == [0] * 5
    assert np.isnan(METRIC_DEPTH.decode(np.zeros(3, np.uint16))).all()


def test_origin_depth_drops_the_sign():
    assert ORIGIN_DEPTH.encode(np.array([-2.0, 2.0, 4.0, 0.0, -20.0])).tolist() == [
        8192,
        8192,
        16384,
        0,
        65535,
    ]
    assert "inverse depth" in ORIGIN_DEPTH.meaning


def test_every_code_survives_decoding_and_encoding():
    codes = np.arange(65536, dtype=np.uint16)
    for codec in (METRIC_DEPTH, ORIGIN_DEPTH):
        np.testing.assert_array_equal(codec.encode(codec.decode(codes)), codes)


@pytest.mark.parametrize(
    "value",
    [
        ModelConfig(variant="timm:resnet18", num_classes=None, head_width=64),
        IMAGENET_PREPROCESSING,
        ORIGIN_PREPROCESSING,
        METRIC_DEPTH,
        ORIGIN_DEPTH,
        WeightsInfo(config=ModelConfig(), depth_codec=METRIC_DEPTH, training_data="none"),
        WeightsInfo(
            config=ModelConfig(has_depth=False), depth_codec=None, training_data="x", trained=False
        ),
    ],
)
def test_dict_round_trip_through_json(value):
    data = value.to_dict()
    assert type(value).from_dict(json.loads(json.dumps(data))) == value
    with pytest.raises(ValueError, match="unknown keys: surprise"):
        type(value).from_dict(data | {"surprise": 1})
    name = next(iter(data))
    with pytest.raises(ValueError, match=f"missing keys: {name}"):
        type(value).from_dict({key: data[key] for key in data if key != name})


def test_weights_info_refuses_a_size_of_nothing():
    with pytest.raises(ValueError, match="short_side_px must be positive or null, not 0"):
        WeightsInfo(
            config=ModelConfig(), depth_codec=METRIC_DEPTH, training_data="", short_side_px=0
        )


def test_weights_info_wants_a_codec_with_a_depth_head_only():
    with pytest.raises(ValueError, match="depth codec"):
        WeightsInfo(config=ModelConfig(), depth_codec=None, training_data="x")
    with pytest.raises(ValueError, match="depth codec"):
        WeightsInfo(
            config=ModelConfig(has_depth=False), depth_codec=METRIC_DEPTH, training_data="x"
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("variant", value)
            for value in (None, 5, "timm:hf-hub:user/model", "timm:../x", "timm:")
        ),
        ("variant", "mit:16,32,80,128:1000000,1,1,1"),
        *(("head_width", value) for value in (True, "x", 0, 10**30, 2.0)),
        *(("num_classes", value) for value in (True, 0, "19")),
        *(("block_norm_eps", value) for value in (None, "x", -1, 0, 2, float("nan"))),
        ("has_depth", 1),
    ],
)
def test_a_field_from_anybody_s_file_is_refused_in_one_line(field, value):
    fields = ModelConfig().to_dict() | {field: value}
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        ModelConfig.from_dict(fields)
