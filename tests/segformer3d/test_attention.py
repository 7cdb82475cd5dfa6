"""Attention maps against a softmax written out from the layers' own weights."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from segformer3d import attention
from segformer3d.attention import AttentionProbe
from segformer3d.config import METRIC_DEPTH, ModelConfig, WeightsInfo
from segformer3d.model import build_model
from segformer3d.predictor import Predictor
from tests.predictions import assert_same_predictions

TINY = "mit:16,32,80,128:1,2,1,1"
HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model(ModelConfig(variant=TINY, head_width=16)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn.q." in name or ".attn.kv." in name:
                parameter.mul_(8)  # or every map would be even
    return model


@pytest.fixture(scope="module")
def predictor(model):
    info = WeightsInfo(config=model.config, depth_codec=METRIC_DEPTH, training_data="none")
    return Predictor(model, info, device="cpu")


def random_frame(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (1, HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def by_hand(model, predictor):
    """The whole (A, N, M) matrices of each stage's last block, from its weights alone."""
    blocks = [stage.blocks[-1] for stage in model.encoder.stages]
    inputs = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks
    ]
    predictor.predict(random_frame())
    for handle in handles:
        handle.remove()
    with torch.inference_mode():
        return [explicit(block, x) for block, x in zip(blocks, inputs, strict=True)]


def explicit(block, x_bhwc):
    layer, x = block.attn, block.norm1(x_bhwc)
    reduced = x
    if layer.sr is not None:
        reduced = functional.conv2d(
            x.permute(0, 3, 1, 2), layer.sr.weight, layer.sr.bias, stride=layer.sr.kernel_size
        ).permute(0, 2, 3, 1)
        reduced = layer.sr_norm(reduced)
    channels = x.shape[-1]
    queries = (x.flatten(1, 2) @ layer.q.weight.T + layer.q.bias)[0]
    keys = (reduced.flatten(1, 2) @ layer.kv.weight.T + layer.kv.bias)[0, :, :channels]
    width = channels // layer.num_heads
    maps = []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = (queries[:, part] @ keys[:, part].T / math.sqrt(width)).double().exp()
        maps.append((scores / scores.sum(1, keepdim=True)).numpy())
    return np.stack(maps)


@pytest.mark.parametrize("point", [(0.0, 0.0), (0.5, 0.5), (0.3, 0.8), (1.0, 1.0)])
def test_a_query_s_maps_are_its_row_of_the_softmax(model, predictor, by_hand, point):
    with AttentionProbe(model) as probe:
        predictor.predict(random_frame())
        stages = probe.at(*point)
    assert [(item.stage, item.block) for item in stages] == [(1, 1), (2, 2), (3, 1), (4, 1)]
    assert probe.num_heads == (1, 2, 5, 8)
    for item, whole in zip(stages, by_hand, strict=True):
        side = 4 * 2 ** (item.stage - 1)
        rows, columns = HEIGHT // side, WIDTH // side
        row, column = min(int(point[1] * rows), rows - 1), min(int(point[0] * columns), columns - 1)
        expected = whole[:, row * columns + column]
        assert item.maps.shape == (len(whole), HEIGHT // 32, WIDTH // 32)
        assert item.maps.dtype == np.float32
        assert np.allclose(item.maps.sum((1, 2)), 1, atol=1e-5)
        assert np.allclose(item.maps.reshape(len(whole), -1), expected, atol=1e-5)
    assert max(whole.max() for whole in by_hand) > 0.4


@pytest.mark.parametrize("chunk_floats", [1, 50, 2**20])
def test_the_mean_is_over_all_queries_whatever_the_chunks(
    model, predictor, by_hand, chunk_floats, monkeypatch
):
    monkeypatch.setattr(attention, "CHUNK_FLOATS", chunk_floats)
    with AttentionProbe(model) as probe:
        predictor.predict(random_frame())
        stages = probe.mean()
    for item, whole in zip(stages, by_hand, strict=True):
        assert np.allclose(item.maps.reshape(len(whole), -1), whole.mean(1), atol=1e-5)
        assert np.allclose(item.maps.sum((1, 2)), 1, atol=1e-5)


def test_the_mean_never_holds_more_than_a_chunk(model, predictor, monkeypatch):
    sizes, real = [], attention._attention

    def watched(q_and, k_amd):
        weights = real(q_and, k_amd)
        sizes.append(weights.numel())
        return weights

    monkeypatch.setattr(attention, "_attention", watched)
    monkeypatch.setattr(attention, "CHUNK_FLOATS", 100)
    with AttentionProbe(model) as probe:
        predictor.predict(random_frame())
        probe.mean()
    assert max(sizes) <= 100


def test_the_last_frame_counts_and_predictions_do_not_change(model, predictor):
    plain = predictor.predict(random_frame(1))
    with AttentionProbe(model) as probe:
        predictor.predict(random_frame(0))
        first = probe.mean()
        watched = predictor.predict(random_frame(1))
        second = probe.mean()
    assert_same_predictions(watched, plain)
    assert not np.allclose(first[3].maps, second[3].maps)


def test_hooks_are_gone_afterwards_also_after_an_error(model, predictor, monkeypatch):
    probe = AttentionProbe(model)
    frames = np.concatenate([random_frame(), random_frame()])
    monkeypatch.setattr(predictor, "micro_batch", 2)
    with pytest.raises(RuntimeError, match="one frame at a time"), probe:
        predictor.predict(frames)
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    with pytest.raises(RuntimeError, match="run the model"):
        probe.mean()


def test_blocks_count_from_either_end(model, predictor):
    with AttentionProbe(model, block=1) as first, AttentionProbe(model, block=-1) as last:
        predictor.predict(random_frame())
        pairs = list(zip(first.mean(), last.mean(), strict=True))
    assert [(a.block, b.block) for a, b in pairs] == [(1, 1), (1, 2), (1, 1), (1, 1)]
    assert [np.array_equal(a.maps, b.maps) for a, b in pairs] == [True, False, True, True]


@pytest.mark.parametrize("block", [0, 2, -2])
def test_a_block_that_a_stage_lacks_is_refused(model, block):
    with pytest.raises(ValueError, match="stage 1 has no block"):
        AttentionProbe(model, block=block)


def test_a_point_outside_the_frame_is_refused(model):
    with pytest.raises(ValueError, match="outside the frame"):
        AttentionProbe(model).at(1.1, 0.5)


def test_other_encoders_are_refused_in_one_line(model):
    class Other(torch.nn.Module):
        config = ModelConfig(variant="timm:resnet18")
        encoder = torch.nn.Identity()

    with pytest.raises(ValueError, match="timm:resnet18 has no attention of this kind"):
        AttentionProbe(Other())
