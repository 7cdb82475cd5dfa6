"""The encoder rearranged for CPUs gives what the plain modules give."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from segformer3d import cpu_encoder, native_blocks
from segformer3d.config import ModelConfig
from segformer3d.cpu_encoder import CpuEncoder
from segformer3d.encoder import build_encoder

SMALL = "mit:8,16,40,64:2,1,2,1"


def random_encoder(variant=SMALL, *, norm_eps=(1e-5, 1e-6), gain=1.0):
    """All parameters matter: biases and norms too."""
    torch.manual_seed(0)
    config = ModelConfig(variant=variant, patch_norm_eps=norm_eps[0], block_norm_eps=norm_eps[1])
    encoder = build_encoder(config).eval()
    for name, value in encoder.named_parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=gain / value[0].numel() ** 0.5)
        else:
            torch.nn.init.normal_(value, mean=float("norm" in name and "weight" in name), std=0.3)
    return encoder


def relative_difference(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def assert_same_maps(encoder, x, limit=3e-6):
    with torch.inference_mode():
        ours = CpuEncoder(encoder)(x)
        theirs = encoder.double()(x.double())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == torch.float32
        assert relative_difference(mine, other) < limit


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 96), (96, 160), (128, 224)])
def test_maps_are_those_of_the_modules(size):
    assert_same_maps(random_encoder(), torch.randn(2, 3, *size))


@pytest.mark.parametrize("variant", ["mit_b0", "mit_b2"])
def test_maps_of_published_sizes(variant):
    assert_same_maps(random_encoder(variant), torch.randn(1, 3, 64, 128))


@pytest.mark.parametrize("tile_floats", [1, 1000])
@pytest.mark.parametrize("band_floats", [1, 5000])
def test_tiles_and_bands_of_any_size(monkeypatch, tile_floats, band_floats):
    monkeypatch.setattr(cpu_encoder, "TILE_FLOATS", tile_floats)
    monkeypatch.setattr(cpu_encoder, "BAND_FLOATS", band_floats)
    assert_same_maps(random_encoder(), torch.randn(1, 3, 96, 160))


def test_epsilons_belong_to_the_norms():
    x = torch.randn(1, 3, 64, 64)
    encoder = random_encoder(norm_eps=(0.3, 0.2))
    assert_same_maps(encoder, x)
    plain = CpuEncoder(random_encoder())(x)
    assert relative_difference(CpuEncoder(encoder.float())(x)[0], plain[0]) > 0.01


def test_scores_too_large_for_bare_powers(monkeypatch):
    """Queries and keys so long that softmax needs its rows' largest scores."""
    encoder = random_encoder()
    for stage in encoder.stages:
        for block in stage.blocks:
            block.attn.q.weight.data *= 60
    seen = []
    within = native_blocks.are_within
    monkeypatch.setattr(
        cpu_encoder, "are_within", lambda *given: seen.append(within(*given)) or seen[-1]
    )
    assert_same_maps(encoder, torch.randn(1, 3, 96, 96), limit=1e-3)
    assert False in seen


def test_no_query_is_longer_than_the_norm_before_it_allows():
    encoder = random_encoder()
    for stage, of_stage in zip(encoder.stages, CpuEncoder(encoder).stages, strict=True):
        block, longest_a = stage.blocks[0], of_stage.blocks[0].attention.longest_a
        channels = len(block.norm1.weight)
        # The longest that a norm gives: all of the spread on the channel of the largest weight.
        worst = torch.zeros(channels)
        worst[block.norm1.weight.abs().argmax()] = 1
        with torch.inference_mode():
            y_nc = block.norm1(torch.cat([torch.randn(500, channels), worst[None]]))
            if len(longest_a) > 1:
                y_nc = y_nc @ block.attn.q.weight.T
        lengths_na = y_nc.view(len(y_nc), len(longest_a), -1).norm(dim=2)
        assert (lengths_na <= longest_a).all()
        assert (lengths_na.amax(0) > 0.2 * longest_a).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    x = torch.randn(1, 3, 64, 64)
    x[0, 1, 20, 20] = value
    for map_ in CpuEncoder(random_encoder())(x):
        assert not map_.isfinite().all()


def test_the_encoder_it_was_made_from_may_change():
    encoder, x = random_encoder(), torch.randn(1, 3, 64, 64)
    ready = CpuEncoder(encoder)
    before = [map_.clone() for map_ in ready(x)]
    for value in encoder.parameters():
        value.data.zero_()
    for map_, other in zip(ready(x), before, strict=True):
        assert torch.equal(map_, other)


@pytest.mark.parametrize("are_small", [True, False])
def test_powers_and_totals_are_a_softmax(are_small):
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 8, (7, 33)).astype(np.float32)
    shift = rng.normal(0, 2, 33).astype(np.float32)
    expected = (torch.from_numpy(scores + shift).double() * np.log(2)).softmax(1)
    totals = np.empty(7, np.float32)
    native_blocks.raise_two(scores, shift, are_small, totals)
    np.testing.assert_allclose(scores / totals[:, None], expected, rtol=3e-6, atol=1e-12)


def test_rows_of_scores_with_their_own_largest_never_overflow():
    scores = np.array([[3e4, 3e4, -3e4], [-5e4, -6e4, -5e4]], np.float32)
    totals = np.empty(2, np.float32)
    native_blocks.raise_two(scores, np.zeros(3, np.float32), False, totals)
    np.testing.assert_allclose(scores / totals[:, None], [[0.5, 0.5, 0], [0.5, 0, 0.5]], atol=1e-30)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_not_within(bad):
    rows = np.ones((3, 4), np.float32)
    limits = np.full(2, 2, np.float32)
    assert native_blocks.are_within(rows, limits)
    assert not native_blocks.are_within(rows, np.array([2, 1.4], np.float32))
    assert not native_blocks.are_within(rows, np.array([2, float("nan")], np.float32))
    rows[1, 2] = bad
    assert not native_blocks.are_within(rows, limits)


@pytest.mark.parametrize("width", [1, 2, 5, 6, 7, 13])
def test_convolution_with_gelu(width):
    torch.manual_seed(0)
    height, channels = 5, 24
    grid_yxc = 3 * torch.randn(height, width, channels)
    weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
    expected = functional.gelu(
        functional.conv2d(grid_yxc.permute(2, 0, 1)[None], weight, bias, 1, 1, 1, channels)
    )[0].permute(1, 2, 0)
    band = np.zeros((height + 2, width, channels), np.float32)
    band[1:-1] = grid_yxc
    out = np.empty((height, width, channels), np.float32)
    taps = np.ascontiguousarray(weight.flatten(1).T)
    biases = np.broadcast_to(bias, (2, 2, 2, 2, channels)).copy()
    native_blocks.convolve_gelu(band, taps, biases, 0, height, out)
    np.testing.assert_allclose(out, expected, atol=3e-6 * float(expected.abs().max()))


def test_gelu_far_from_zero():
    x = np.array([-30, -6, -5.2, -1e-3, 0, 1e-3, 5.2, 6, 30], np.float32)
    band = np.zeros((3, 1, len(x)), np.float32)
    band[1, 0] = x
    taps = np.zeros((9, len(x)), np.float32)
    taps[4] = 1
    out = np.empty((1, 1, len(x)), np.float32)
    native_blocks.convolve_gelu(band, taps, np.zeros((2, 2, 2, 2, len(x)), np.float32), 0, 1, out)
    expected = functional.gelu(torch.from_numpy(x).double())
    assert (np.abs(out[0, 0] - expected.numpy()) <= 2e-7 * np.maximum(np.abs(x), 1)).all()
