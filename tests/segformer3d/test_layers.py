import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from segformer3d.layers import (
    BatchNorm,
    Block,
    ChannelDropout,
    DropPath,
    EfficientAttention,
    MixFFN,
    PatchEmbedding,
    init_weights,
    resize_bilinear,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("kernel", "stride"), [(7, 4), (3, 2)])
def test_patch_embedding_divides_the_grid_by_its_stride(kernel, stride):
    embed = PatchEmbedding(3, 8, kernel=kernel, stride=stride, norm_eps=1e-5)
    assert embed(torch.randn(2, 3, 32, 64)).shape == (2, 32 // stride, 64 // stride, 8)


@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_attention_is_softmax_attention_over_the_reduced_grid(sr_ratio):
    attention = EfficientAttention(8, num_heads=2, sr_ratio=sr_ratio, norm_eps=1e-5)
    x = torch.randn(3, 4, 6, 8)
    q, k, v = attention.queries_keys_values(x)
    assert q.shape == (3, 2, 24, 4)
    assert k.shape == v.shape == (3, 2, 24 // sr_ratio**2, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(3, 4, 6, 8))
    torch.testing.assert_close(attention(x), expected)


def test_keys_come_before_values():
    attention = EfficientAttention(8, num_heads=2, sr_ratio=1, norm_eps=1e-5)
    x = torch.randn(1, 2, 3, 8)
    _, k, v = attention.queries_keys_values(x)
    both = functional.linear(x.flatten(1, 2), attention.kv.weight, attention.kv.bias)
    torch.testing.assert_close(k.transpose(1, 2).flatten(2), both[..., :8])
    torch.testing.assert_close(v.transpose(1, 2).flatten(2), both[..., 8:])


def test_mix_ffn_mixes_neighbours_only():
    ffn = MixFFN(4, mlp_ratio=4).eval()
    x = torch.zeros(1, 5, 5, 4)
    moved = x.clone()
    moved[0, 2, 2] = 1.0
    changed = (ffn(moved) - ffn(x)).abs().amax(-1)[0] > 0
    assert changed[1:4, 1:4].all()
    assert changed.sum() == 9


def test_block_keeps_shape_and_adds_to_its_input():
    block = Block(
        8,
        num_heads=2,
        sr_ratio=2,
        mlp_ratio=4,
        drop_path=0.0,
        norm_eps=1e-6,
        reduction_norm_eps=1e-5,
    )
    for layer in (block.attn.proj, block.ffn.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(block(x), x)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = drop(x).flatten(1)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out == out[:, :1]).all()
    assert abs(out.mean() - 1) < 0.05
    assert drop.eval()(x) is x


def test_init_weights_scales_convolutions_by_their_fan_out():
    conv = nn.Conv2d(64, 64, 3, groups=64)
    linear = nn.Linear(256, 256)
    for layer in (conv, linear):
        init_weights(layer)
        assert not layer.bias.any()
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_resize_is_bilinear_without_aligned_corners():
    x = torch.tensor([[[[0.0, 1.0]]]])
    torch.testing.assert_close(
        resize_bilinear(x, (1, 4)), torch.tensor([[[[0.0, 0.25, 0.75, 1.0]]]])
    )
    assert resize_bilinear(x, (1, 2)) is x


def test_channel_dropout_drops_whole_channels_and_keeps_the_mean():
    dropout = ChannelDropout(0.25)
    x = torch.ones(64, 32, 3, 5)
    dropped = dropout(x)
    first = dropped[:, :, :1, :1]
    assert torch.equal(dropped, first.expand_as(dropped))
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(dropout.eval()(x), x)


def test_batch_norm_alone_is_torchs():
    ours, theirs = BatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 6)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
