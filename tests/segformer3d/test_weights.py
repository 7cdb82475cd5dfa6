"""Golden tests of every import, and of our own weights files.

The foreign networks have every parameter and buffer randomised: their own initial biases and
running means are zero and their epsilons invisible, which would hide errors.
"""

import hashlib
import json
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import nn

from jobs.weights import import_to_file
from pipeline.errors import UserError
from segformer3d.config import (
    IMAGENET_PREPROCESSING,
    METRIC_DEPTH,
    ORIGIN_DEPTH,
    ORIGIN_PREPROCESSING,
    ModelConfig,
    Preprocessing,
    WeightsInfo,
)
from segformer3d.labels import CLASS_NAMES
from segformer3d.model import build_model
from segformer3d.weights import (
    import_weights,
    load_weights,
    model_from_bytes,
    remap_huggingface,
    remap_nvlabs,
    remap_origin,
    save_weights,
    untrained_weights,
    weights_to_bytes,
)
from segformer3d.weights_file import METADATA_KEY, WeightsError, read_info
from tests.golden_tensors import read_golden

TINY = "mit:8,16,40,64:1,2,1,1"
TOLERANCE = 1e-5  # of the largest value; the project asks for 1e-4


def randomise(model: nn.Module) -> None:
    """Randomise everything, such that epsilons, keys and biases all show in the outputs.

    Norm gains and variances are small, so that an epsilon counts; matrices are large, so that
    attention is far from uniform all the same.
    """
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(1e-3 * (0.5 + torch.rand(value.shape, generator=generator)))
        elif not value.is_floating_point():
            value.fill_(123)
        else:
            gain = {1: 0.03, 2: 8.0, 4: 0.5}[value.ndim]
            if re.search(r"attn\.q\.|q_proj|k_proj", name):
                gain *= 10
            fan_in = value[0].numel() if value.ndim > 1 else 1
            value.normal_(0, gain / fan_in**0.5, generator=generator)


def differences(actual, expected):
    return [
        ((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)
    ]


def assert_same(actual, expected):
    assert max(differences(actual, expected)) < TOLERANCE


@torch.inference_mode()
def run(model, x):
    """Return the four features and the logits at H / 4."""
    return [*model.forward_features(x), model(x).logits]


def with_config(model, **changes):
    """Return the same weights under a changed configuration."""
    changed = build_model(replace(model.config, **changes)).eval()
    changed.load_state_dict(model.state_dict())
    return changed


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


HUGGINGFACE_SIZES = {
    "mit_b0": ([32, 64, 160, 256], [2, 2, 2, 2], 256),
    "mit_b2": ([64, 128, 320, 512], [3, 4, 6, 3], 768),
    "mit_b5": ([64, 128, 320, 512], [3, 6, 40, 3], 768),
}


def save_huggingface(folder, variant="mit_b0", *, num_labels=19):
    """Save a randomised SegFormer of transformers; return an input and what it gives."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    dims, depths, width = HUGGINGFACE_SIZES[variant]
    config = SegformerConfig(
        hidden_sizes=dims, depths=depths, decoder_hidden_size=width, num_labels=num_labels
    )
    # Randomised whole a moment later: its own initialisation would only cost time.
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(config)
    model = model.to_empty(device="cpu").eval()
    randomise(model)
    model.save_pretrained(folder)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(x, output_hidden_states=True)
    return x, [*output.hidden_states, output.logits]


@pytest.fixture(scope="module")
def huggingface_b0(tmp_path_factory):
    folder = tmp_path_factory.mktemp("huggingface-b0")
    return folder, *save_huggingface(folder)


@pytest.mark.parametrize("variant", ["mit_b0", "mit_b2", "mit_b5"])
def test_huggingface_weights_give_the_same(variant, tmp_path):
    x, expected = save_huggingface(tmp_path, variant)
    model, info = import_weights(tmp_path)
    assert_same(run(model, x), expected)
    assert info.config == ModelConfig(
        variant=variant,
        head_width=HUGGINGFACE_SIZES[variant][2],
        has_depth=False,
        block_norm_eps=1e-5,
    )
    assert info.preprocessing == IMAGENET_PREPROCESSING
    assert info.trained
    assert not model.training


def test_every_tensor_shows_in_the_comparison(huggingface_b0):
    folder, x, expected = huggingface_b0
    model, _ = import_weights(folder)
    hidden = []
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            before = value.clone()
            value.mul_(1.5)
            if max(differences(run(model, x), expected)) < TOLERANCE:
                hidden.append(name)
            value.copy_(before)
    assert hidden == []
    assert_same(run(model, x), expected)


@pytest.mark.parametrize(
    "change",
    [{"patch_norm_eps": 1e-6}, {"block_norm_eps": 1e-6}, {"head_norm_eps": 1e-6}],
    ids=lambda change: next(iter(change)),
)
def test_another_epsilon_fails_the_comparison(huggingface_b0, change):
    folder, x, expected = huggingface_b0
    mutant = with_config(import_weights(folder)[0], **change)
    assert max(differences(run(mutant, x), expected)) > 3 * TOLERANCE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("attention.self.key", "attention.self.value"),
        ("attention.self.key", "attention.self.query"),
        ("layer_norm_1", "layer_norm_2"),
        ("linear_fuse.weight", "reversed stages"),
    ],
)
def test_swapped_tensors_fail_the_comparison(huggingface_b0, tmp_path, one, other):
    folder, x, expected = huggingface_b0
    shutil.copy(folder / "config.json", tmp_path)
    state = load_file(folder / "model.safetensors")
    swap = {one: other, other: one}
    swapped = {
        re.sub(f"{re.escape(one)}|{re.escape(other)}", lambda m: swap[m[0]], name): value
        for name, value in state.items()
    }
    if one == "linear_fuse.weight":
        quarters = state["decode_head.linear_fuse.weight"].chunk(4, dim=1)
        swapped = state | {"decode_head.linear_fuse.weight": torch.cat(quarters[::-1], dim=1)}
    save_file(swapped, tmp_path / "model.safetensors")
    mutant, _ = import_weights(tmp_path)
    assert max(differences(run(mutant, x), expected)) > 3 * TOLERANCE


def test_huggingface_pickle_and_preprocessing(huggingface_b0, tmp_path):
    folder, x, expected = huggingface_b0
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "do_normalize": True})
    )
    model, info = import_weights(tmp_path)
    assert_same(run(model, x), expected)
    assert info.preprocessing == Preprocessing(mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    mine = Preprocessing(channel_order="bgr")
    assert import_weights(tmp_path, preprocessing=mine)[1].preprocessing == mine
    config = json.loads((folder / "config.json").read_text())
    names = [name.title().replace(" ", "_") for name in CLASS_NAMES]
    for spelled in (
        CLASS_NAMES,
        names,
        ["motorbike" if "cycle" in name else name for name in names],
    ):
        config["id2label"] = dict(enumerate(spelled))
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert_same(run(import_weights(tmp_path)[0], x), expected)


def test_huggingface_mistakes(huggingface_b0, tmp_path):
    folder, _, _ = huggingface_b0

    def refusal(**changes):
        with pytest.raises(WeightsError) as error:
            import_weights(tmp_path)
        return one_line(error)

    assert "no config.json" in refusal()
    config = json.loads((folder / "config.json").read_text())

    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))

    write()
    assert "neither model.safetensors nor pytorch_model.bin" in refusal()
    shutil.copy(folder / "model.safetensors", tmp_path)
    write(architectures=["SegformerForImageClassification"])
    assert "only SegformerForSemanticSegmentation" in refusal()
    write(num_attention_heads=[1, 2, 4, 8])
    assert "num_attention_heads [1, 2, 4, 8], but SegFormer has [1, 2, 5, 8]" in refusal()
    write(id2label={index: f"organ {index}" for index in range(19)})
    assert "calls class 0 'organ 0' and class 1 'organ 1': only the 19 classes of" in refusal()
    write(id2label=dict(enumerate(reversed(CLASS_NAMES))))
    assert "calls class 0 'bicycle'" in refusal()
    write()
    (tmp_path / "preprocessor_config.json").write_text('{"rescale_factor": 1.0}')
    assert "rescaled by 1/255" in refusal()
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [1]}')
    assert "three numbers" in refusal()
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert "damaged" in refusal()


def test_another_number_of_classes_is_refused(tmp_path):
    save_huggingface(tmp_path, num_labels=150)
    with pytest.raises(
        WeightsError, match="has 150 classes, but only the 19 of Cityscapes"
    ) as error:
        import_weights(tmp_path)
    one_line(error)


@pytest.fixture(scope="module")
def origin():
    return read_golden()


def test_origin_weights_give_the_golden_tensors(origin, tmp_path):
    tensors, state = origin
    torch.save(state, tmp_path / "origin.pt")
    model, info = import_weights(tmp_path / "origin.pt")
    assert info == WeightsInfo(
        config=ModelConfig(variant="mit:16,32,80,128:1,2,2,1", head_width=24),
        preprocessing=ORIGIN_PREPROCESSING,
        depth_codec=ORIGIN_DEPTH,
        training_data="a Cityscapes subset, by adithyagaurav/Segformer3D",
    )
    assert_same(origin_outputs(model, tensors), origin_golden(tensors))


@torch.inference_mode()
def origin_outputs(model, tensors):
    features = model.forward_features(tensors["input"])
    outputs = model(tensors["input"])
    full = outputs.resized((96, 160))
    return [*features, outputs.logits, outputs.depth, full.logits, full.depth]


def origin_golden(tensors):
    outputs = ("logits_quarter", "depth_quarter", "logits", "depth")
    return [tensors[name] for name in (*(f"features.{stage}" for stage in range(4)), *outputs)]


@pytest.mark.parametrize(
    "change",
    [{"patch_norm_eps": 1e-6}, {"block_norm_eps": 1e-5}, {"head_norm_eps": 1e-6}],
    ids=lambda change: next(iter(change)),
)
def test_the_origin_golden_tensors_tell_the_epsilons(origin, tmp_path, change):
    tensors, state = origin
    torch.save(state, tmp_path / "origin.pt")
    model, _ = import_weights(tmp_path / "origin.pt")
    right = max(differences(origin_outputs(model, tensors), origin_golden(tensors)))
    mutant = with_config(model, **change)
    wrong = max(differences(origin_outputs(mutant, tensors), origin_golden(tensors)))
    assert wrong > 4 * right


def test_origin_names_are_all_known(origin):
    _, state = origin
    renamed = remap_origin(state)
    assert not [name for name in renamed if name.startswith(("backbone", "decoder_head"))]
    assert renamed["segmentation_head.project.0.weight"] is state["decoder_head.layers.3.weight"]


def to_nvlabs(state):
    """Name our state dict as NVlabs' SegFormer does, with the layer that it never uses."""
    named = {
        "decode_head.conv_seg.weight": torch.zeros(1),
        "decode_head.conv_seg.bias": torch.ones(1),
    }
    for name, value in state.items():
        if name.startswith("encoder"):
            _, _, stage, kind, *rest = name.split(".")
            tail = ".".join(rest)
            tail = tail.replace("sr_norm", "norm").replace("ffn.conv", "ffn.dwconv.dwconv")
            place = {"blocks": "block"}.get(kind, kind) + str(int(stage) + 1)
            named[f"backbone.{place}.{tail.replace('ffn', 'mlp')}"] = value
        else:
            _, part, *rest = name.split(".")
            if part == "project":
                matrix = value.flatten(1) if value.ndim == 4 else value
                named[f"decode_head.linear_c{int(rest[0]) + 1}.proj.{rest[1]}"] = matrix
            else:
                place = {
                    "fuse": "linear_fuse.conv",
                    "norm": "linear_fuse.bn",
                    "predict": "linear_pred",
                }
                named[f"decode_head.{place[part]}.{rest[0]}"] = value
    return named


@pytest.fixture(scope="module")
def nvlabs():
    model = build_model(ModelConfig(variant=TINY, head_width=16, has_depth=False)).eval()
    randomise(model)
    return model, to_nvlabs(model.state_dict())


def test_swapped_keys_and_values_fail_the_origin_golden_tensors(origin, tmp_path):
    tensors, state = origin
    swapped = {
        name: torch.cat(value.chunk(2)[::-1]) if ".kv." in name else value
        for name, value in state.items()
    }
    torch.save(swapped, tmp_path / "origin.pt")
    model, _ = import_weights(tmp_path / "origin.pt")
    assert max(differences(origin_outputs(model, tensors), origin_golden(tensors))) > 1e-3


def test_nvlabs_names(nvlabs):
    _, state = nvlabs
    assert {
        "backbone.patch_embed1.proj.weight",
        "backbone.patch_embed4.norm.bias",
        "backbone.block1.0.norm1.weight",
        "backbone.block1.0.attn.q.weight",
        "backbone.block1.0.attn.kv.bias",
        "backbone.block1.0.attn.proj.weight",
        "backbone.block1.0.attn.sr.weight",
        "backbone.block1.0.attn.norm.weight",
        "backbone.block2.1.norm2.bias",
        "backbone.block2.1.mlp.fc1.weight",
        "backbone.block2.1.mlp.dwconv.dwconv.weight",
        "backbone.block2.1.mlp.fc2.bias",
        "backbone.norm4.weight",
        "decode_head.conv_seg.weight",
        "decode_head.linear_c4.proj.weight",
        "decode_head.linear_c1.proj.bias",
        "decode_head.linear_fuse.conv.weight",
        "decode_head.linear_fuse.bn.running_var",
        "decode_head.linear_pred.weight",
    } <= state.keys()


@pytest.mark.parametrize("wrapped", [False, True])
def test_nvlabs_weights_give_the_same(nvlabs, tmp_path, wrapped):
    model, state = nvlabs
    if wrapped:
        state = {
            "meta": {"epoch": 1, "CLASSES": ["road"]},
            "state_dict": state | {"auxiliary_head.conv.weight": torch.zeros(1)},
        }
    torch.save(state, tmp_path / "segformer.b0.pth")
    imported, info = import_weights(tmp_path / "segformer.b0.pth")
    assert info.config == model.config
    assert info.depth_codec is None
    assert info.preprocessing == IMAGENET_PREPROCESSING
    x = torch.randn(1, 3, 64, 96)
    assert_same(run(imported, x), run(model, x))
    for name, value in model.state_dict().items():
        assert torch.equal(imported.state_dict()[name], value)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def test_import_is_strict_both_ways(nvlabs, tmp_path):
    _, state = nvlabs
    path = tmp_path / "w.pth"

    def refusal(changed):
        torch.save(changed, path)
        with pytest.raises(WeightsError) as error:
            import_weights(path)
        assert str(path) in str(error.value)
        return one_line(error)

    odd = {f"backbone.odd{i}.weight": torch.zeros(1) for i in range(5)}
    assert (
        "unexpected tensors: backbone.odd0.weight, backbone.odd1.weight, backbone.odd2.weight "
        "and 2 more" in refusal(state | odd)
    )
    assert "missing (named as here): encoder.stages.0.norm.bias" in refusal(
        without(state, "backbone.norm1.bias")
    )
    assert "missing (named as here): encoder.stages.1.patch_embed.proj.weight" in refusal(
        without(state, "backbone.patch_embed2.proj.weight")
    )
    assert "missing (named as here): segmentation_head.fuse.weight" in refusal(
        without(state, "decode_head.linear_fuse.conv.weight")
    )
    assert "another shape (named as here): encoder.stages.3.norm.bias" in refusal(
        state | {"backbone.norm4.bias": torch.zeros(3)}
    )
    assert "two tensors both stand for" in refusal(
        state | {"encoder.stages.0.norm.bias": torch.zeros(8)}
    )
    assert "its sizes are no SegFormer's" in refusal(
        {name: value for name, value in state.items() if ".block3." not in name}
    )
    assert "at least one head" in refusal(
        {name: value for name, value in state.items() if not name.startswith("decode_head")}
    )


def test_a_missing_value_projection_is_named(huggingface_b0):
    folder, _, _ = huggingface_b0
    state = load_file(folder / "model.safetensors")
    lost = "segformer.encoder.block.0.0.attention.self.value.weight"
    assert "encoder.stages.0.blocks.0.attn.k.weight" in remap_huggingface(without(state, lost))
    assert "encoder.stages.0.blocks.0.attn.kv.weight" in remap_huggingface(state)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["backbone.layers.0.0.projection.weight"], "OpenMMLab's SegFormer"),
        (["decode_head.convs.0.conv.weight"], "OpenMMLab's SegFormer"),
        (["decode_head.fusion_conv.conv.weight"], "OpenMMLab's SegFormer"),
        (["patch_embed1.proj.weight", "head.weight"], "an encoder without a head"),
        (["segformer.encoder.layer_norm.0.bias"], "give the directory, not the file"),
        (["conv1.weight", "fc.bias"], r"unknown names \(conv1.weight, fc.bias\)"),
    ],
)
def test_other_architectures_are_refused(tmp_path, names, message):
    path = tmp_path / "w.pth"
    torch.save({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(WeightsError, match=message) as error:
        import_weights(path)
    one_line(error)


class Evil:
    def __reduce__(self):
        return (print, ("never run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil(), protocol=2), "refused, it is damaged or holds more than tensors"),
        (b"", "damaged"),
        (b"\x00nonsense", "damaged"),
        (b"PK\x03\x04nonsense", "damaged"),
    ],
)
def test_pickles_that_run_code_or_are_damaged_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        import_weights(path)
    one_line(error)
    assert "never run" not in capsys.readouterr().out


def test_every_damaged_pickle_is_refused_in_one_line(origin, tmp_path):
    path = tmp_path / "w.pt"
    torch.save({name: value for name, value in origin[1].items() if value.ndim == 1}, path)
    good = path.read_bytes()
    choice = random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(3):
            data[choice.randrange(len(data))] ^= 1 + choice.randrange(255)
        path.write_bytes(data[: choice.randrange(len(data))])
        with pytest.raises(WeightsError) as error:
            import_weights(path)
        one_line(error)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.zeros(3)])
def test_a_pickle_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="holds no state dict") as error:
        import_weights(tmp_path / "w.pt")
    one_line(error)


def test_a_missing_file_is_an_os_error(tmp_path):
    for read in (import_weights, load_weights, read_info):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.pth")


def test_the_verb_blames_what_is_to_blame_and_says_it_once(tmp_path, monkeypatch):
    source, target = tmp_path / "source.safetensors", tmp_path / "no" / "target.safetensors"

    def refusal():
        with pytest.raises(UserError) as error:
            import_to_file(str(source), str(target))
        return str(error.value)

    assert refusal() == f"weights {source}: no such file or folder"
    source.write_bytes(b"nonsense")
    assert refusal().count(str(source)) == 1
    source.write_bytes(untrained_weights(TINY))
    assert refusal() == f"{target}: No such file or directory"

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal() == f"weights {source}: Permission denied"


def test_remaps_do_not_change_their_argument(nvlabs):
    _, state = nvlabs
    names = list(state)
    remap_nvlabs(state)
    assert list(state) == names


@pytest.fixture
def small():
    config = ModelConfig(variant=TINY, head_width=16)
    model = build_model(config).eval()
    randomise(model)
    return model, WeightsInfo(config=config, depth_codec=METRIC_DEPTH, training_data="tests")


def test_weights_file_round_trip(small, tmp_path):
    model, info = small
    path = tmp_path / "w.safetensors"
    save_weights(path, model, info)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    data = path.read_bytes()
    assert data == weights_to_bytes(model, info)
    for source in (path, str(path), data):
        assert read_info(source) == info
        loaded = load_weights(source)
        assert not loaded.training
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
    assert model_from_bytes(data)[1] == info
    imported, same = import_weights(path)
    assert same == info
    assert imported.config == model.config
    assert all(value.requires_grad for value in imported.parameters())


def test_a_failed_save_leaves_nothing(small, tmp_path):
    model, info = small
    (tmp_path / "w").mkdir()
    with pytest.raises(OSError, match="w"):
        save_weights(tmp_path / "w", model, info)
    assert [file.name for file in tmp_path.iterdir()] == ["w"]
    with pytest.raises(WeightsError, match="info describes"):
        save_weights(
            tmp_path / "v", model, replace(info, config=replace(info.config, head_width=8))
        )


def test_half_precision_files_load_as_float32(small):
    model, info = small
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    loaded = load_weights(save(half, {METADATA_KEY: json.dumps(info.to_dict())}))
    for name, value in loaded.state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
        assert torch.equal(value, half[name].to(value.dtype))


def test_a_weights_file_is_strict(small):
    model, info = small
    state = dict(model.state_dict())

    def refusal(state, metadata):
        with pytest.raises(WeightsError) as error:
            load_weights(save(state, metadata))
        return one_line(error)

    good = {METADATA_KEY: json.dumps(info.to_dict())}
    name = "encoder.stages.0.norm.bias"
    assert f"tensors are missing (named as here): {name}" in refusal(without(state, name), good)
    assert "unexpected tensors: more" in refusal(state | {"more": torch.zeros(1)}, good)
    assert "another project" in refusal(state, None)
    assert "unknown keys: surprise" in refusal(
        state, {METADATA_KEY: json.dumps(info.to_dict() | {"surprise": 1})}
    )
    for data in (b"", b"nonsense", b"\xff" * 64, weights_to_bytes(model, info)[:-10]):
        with pytest.raises(WeightsError) as error:
            load_weights(data)
        one_line(error)


@pytest.mark.parametrize("metadata", [None, [], "x", 5])
def test_metadata_of_another_shape_is_refused(metadata):
    header = json.dumps({"__metadata__": metadata}).encode()
    with pytest.raises(WeightsError, match="its metadata is no JSON object") as error:
        read_info(struct.pack("<Q", len(header)) + header)
    one_line(error)


def test_a_name_that_no_file_can_have_is_refused(small):
    for use in (read_info, load_weights, import_weights, lambda path: save_weights(path, *small)):
        with pytest.raises(WeightsError, match="not a file name") as error:
            use("a\0b.safetensors")
        one_line(error)


def test_untrained_weights_are_the_same_bytes_everywhere():
    data = untrained_weights(TINY)
    assert untrained_weights(TINY) == data
    assert untrained_weights(TINY, seed=1) != data
    code = (
        "import hashlib; from segformer3d.weights import untrained_weights;"
        f"print(hashlib.sha256(untrained_weights({TINY!r})).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == hashlib.sha256(data).hexdigest()
    info = read_info(data)
    assert not info.trained
    assert "untrained" in info.training_data
    assert info.depth_codec == METRIC_DEPTH
    assert sorted(load(data)) == sorted(load_weights(data).state_dict())


def test_untrained_weights_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    untrained_weights(TINY)
    assert torch.equal(torch.rand(1), before)


def test_timm_weights_round_trip():
    data = untrained_weights("timm:test_convnext")
    model, info = model_from_bytes(data)
    assert info.config.timm_name == "test_convnext"
    assert weights_to_bytes(model, info) == data


def test_a_model_is_loaded_without_the_compiler_of_torch():
    """Importing dynamo costs an actor over a second and a hundred megabytes."""
    program = (
        "import sys, numpy as np\n"
        "from segformer3d import Predictor, model_from_bytes\n"
        "from segformer3d.weights_file import bundled_weights\n"
        "predictor = Predictor(*model_from_bytes(bundled_weights()), device='cpu')\n"
        "predictor.predict(np.zeros((1, 32, 32, 3), np.uint8))\n"
        "heavy = {'torch._dynamo', 'sympy', 'timm', 'torchvision'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
