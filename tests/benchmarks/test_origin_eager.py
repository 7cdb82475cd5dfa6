"""The origin's network as made anew for benchmarks: it gives the origin's outputs, and ours."""

import numpy as np
import pytest
import torch

from benchmarks.model import count_g
from benchmarks.origin_eager import OriginEager, OriginNetwork, origin_network, origin_state
from segformer3d.config import ORIGIN_DEPTH, ModelConfig, Preprocessing, WeightsInfo
from segformer3d.heads import DepthHead, FoldedHeads, SegmentationHead
from segformer3d.model import build_model
from segformer3d.predictor import Predictor
from segformer3d.weights import remap_origin
from tests.golden_tensors import read_golden
from tests.segformer3d.training_parts import TINY

GOLDEN_CONFIG = ModelConfig(variant="mit:16,32,80,128:1,2,2,1", head_width=24)
TOLERANCE = 1e-5  # of the largest value


@pytest.fixture(scope="module")
def golden():
    return read_golden()


@pytest.fixture
def model():
    """One of ours; random norms and biases, so that none of them can be left out unnoticed.

    Random predictions too: with its initial ones a model says the same class everywhere.
    """
    torch.manual_seed(0)
    model = build_model(ModelConfig(variant=TINY, head_width=16)).eval()
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "bias", "predict.weight")):
            value.normal_()
        elif name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
            value.uniform_(0.5, 2)
    return model


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@torch.inference_mode()
def test_the_golden_tensors(golden):
    tensors, state = golden
    network = OriginNetwork(GOLDEN_CONFIG)
    network.load_state_dict(state)
    for stage, map_ in enumerate(network.backbone(tensors["input"])):
        assert_close(map_, tensors[f"features.{stage}"])
    outputs = (*network.quarter(tensors["input"]), *network(tensors["input"]))
    names = ("logits_quarter", "depth_quarter", "logits", "depth")
    for output, name in zip(outputs, names, strict=True):
        assert_close(output, tensors[name])


def test_names_are_the_origins_own(golden):
    _, state = golden
    assert set(origin_state(remap_origin(state))) == set(state)


def test_the_origins_size():
    with torch.device("meta"):
        network = OriginNetwork(ModelConfig(variant="mit_b3"))
    assert len(network.state_dict()) == 604
    assert sum(value.numel() for value in network.parameters()) == 45_128_916


@torch.inference_mode()
def test_it_computes_what_our_model_does(model):
    picture = torch.randn(2, 3, 64, 96)
    ours = model(picture).resized((64, 96))
    logits, depth = origin_network(model)(picture)
    assert_close(logits, ours.logits)
    assert_close(depth, ours.depth)


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_frames_give_what_our_predictor_does(model, channel_order):
    preprocessing = Preprocessing(channel_order=channel_order)
    origin = OriginEager(origin_network(model), preprocessing)
    info = WeightsInfo(
        config=model.config,
        preprocessing=preprocessing,
        depth_codec=ORIGIN_DEPTH,
        training_data="none",
    )
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
    class_ids, depth = origin.frame_to_outputs(frames)
    ours = Predictor(model, info, device="cpu").predict(frames)
    assert class_ids.dtype == np.uint8
    assert depth.dtype == np.float32
    assert depth.shape == class_ids.shape == (2, 64, 96)
    assert len(np.unique(class_ids)) > 3
    assert (class_ids == ours.class_ids).mean() >= 0.9999
    with torch.inference_mode():
        _, quarter = origin.network.quarter(origin.normalised(torch.from_numpy(frames)))
    codes = ORIGIN_DEPTH.encode(quarter[:, 0].numpy()).astype(int)
    assert np.abs(codes - ours.depth).max() <= 1


def test_a_missing_head_is_refused():
    with pytest.raises(ValueError, match="both heads"):
        OriginNetwork(ModelConfig(variant=TINY, has_depth=False))


@pytest.mark.parametrize(
    ("variant", "head_width", "unfolded_g", "folded_g"),
    [
        ("mit_b0", 256, 26.9, 9.7),
        ("mit_b3", 256, 105.0, 87.8),
        ("mit_b0", 768, 166.7, 12.1),
        ("mit_b3", 768, 246.9, 92.3),
        ("mit_b5", 768, 320.4, 165.8),
    ],
)
def test_multiply_adds_of_a_frame_of_512x1024(variant, head_width, unfolded_g, folded_g):
    config = ModelConfig(variant=variant, head_width=head_width)
    with torch.device("meta"):
        model, origin = build_model(config).eval(), OriginNetwork(config).eval()
        picture = torch.empty(1, 3, 512, 1024)
    dims = model.encoder.embed_dims
    heads = FoldedHeads(
        [
            SegmentationHead(dims, head_width, 19, norm_eps=config.head_norm_eps),
            DepthHead(dims, head_width, norm_eps=config.head_norm_eps),
        ]
    )
    maps = [torch.zeros(1, dim, 128 >> stage, 256 >> stage) for stage, dim in enumerate(dims)]
    with torch.inference_mode():
        assert count_g(lambda: origin(picture)) == pytest.approx(unfolded_g, abs=0.06)
        ours = count_g(lambda: model.forward_features(picture)) + count_g(lambda: heads(maps))
    assert ours == pytest.approx(folded_g, abs=0.06)
