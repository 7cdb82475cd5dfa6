import copy

import pytest
import torch
from torch import nn

from segformer3d import heads as heads_module
from segformer3d.heads import DepthHead, FoldedHeads, SegmentationHead

DIMS = (8, 16, 40, 64)


def randomised(head: nn.Module) -> nn.Module:
    for name, value in head.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.normal_(std=0.5)
    return head.eval()


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return [
        randomised(SegmentationHead(DIMS, 24, 19, norm_eps=1e-5)),
        randomised(DepthHead(DIMS, 24, norm_eps=1e-5)),
    ]


def maps_of(batch, height, width):
    return [
        torch.randn(batch, dim, height >> stage, width >> stage) for stage, dim in enumerate(DIMS)
    ]


def test_heads_predict_at_the_finest_map(heads):
    maps = maps_of(2, 16, 24)
    assert heads[0](maps).shape == (2, 19, 16, 24)
    assert heads[1](maps).shape == (2, 1, 16, 24)


def test_fuse_takes_the_deepest_stage_first(heads):
    head = heads[0]
    maps = maps_of(1, 16, 24)
    with torch.no_grad():
        head.fuse.weight[:, :24] = 0  # the first quarter: the deepest stage
    before = head(maps)
    maps[3] = maps[3] + 1
    torch.testing.assert_close(head(maps), before)
    maps[0] = maps[0] + 1
    assert not torch.allclose(head(maps), before)


def relative_difference(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("band_floats", [1, 2000, 2**19])
@pytest.mark.parametrize("batch", [1, 3])
def test_folded_heads_are_the_same_function(heads, batch, band_floats, monkeypatch):
    monkeypatch.setattr(heads_module, "BAND_FLOATS", band_floats)
    folded = FoldedHeads(heads)
    maps = maps_of(batch, 32, 40)
    with torch.inference_mode():
        for head, out in zip(heads, folded(maps), strict=True):
            assert out.dtype == torch.float32
            assert relative_difference(out, head(maps)) < 1e-5


def test_folded_heads_are_the_same_function_without_compiled_code(heads, monkeypatch):
    monkeypatch.setattr(heads_module, "_is_plain", lambda _: False)
    folded = FoldedHeads(heads)
    maps = maps_of(2, 32, 40)
    with torch.inference_mode():
        for head, out in zip(heads, folded(maps), strict=True):
            assert relative_difference(out, head(maps)) < 1e-5


def test_folded_heads_let_gradients_through(heads):
    maps = [map_.requires_grad_() for map_ in maps_of(1, 16, 16)]
    for gradient in torch.autograd.grad(sum(out.sum() for out in FoldedHeads(heads)(maps)), maps):
        assert gradient.abs().sum() > 0


def test_folded_heads_are_no_further_from_float64_than_the_heads(heads):
    folded = FoldedHeads(heads)
    maps = maps_of(2, 32, 40)
    with torch.inference_mode():
        for head, out in zip(heads, folded(maps), strict=True):
            exact = copy.deepcopy(head).double()([map_.double() for map_ in maps])
            assert relative_difference(out, exact) <= 2 * relative_difference(head(maps), exact)


@pytest.mark.parametrize("index", [0, 1])
def test_one_head_folds_alone(heads, index):
    maps = maps_of(1, 16, 16)
    with torch.inference_mode():
        (out,) = FoldedHeads([heads[index]])(maps)
        assert relative_difference(out, heads[index](maps)) < 1e-5


def test_folded_heads_keep_nothing_of_the_heads(heads):
    maps = maps_of(1, 16, 16)
    folded = FoldedHeads(heads)
    before = folded(maps)[0].clone()
    for value in heads[0].parameters():
        nn.init.zeros_(value)
    torch.testing.assert_close(folded(maps)[0], before)
    assert not any(value.requires_grad for value in folded.parameters())


def test_last_product_stays_float32_under_autocast(heads):
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        outs = FoldedHeads(heads)(maps_of(1, 16, 16))
    assert {out.dtype for out in outs} == {torch.float32}


def test_training_computes_the_same_function(heads):
    """The folded form of training equals projecting, resizing, concatenating and fusing."""
    head = heads[0]
    maps = [map_.requires_grad_() for map_ in maps_of(2, 16, 24)]
    literal, folded = head._fuse(maps), head._fuse_folded(maps)
    assert relative_difference(folded, literal) < 1e-5
    weight = torch.randn_like(literal)
    inputs = [*maps, *head.project.parameters(), head.fuse.weight]
    for ours, theirs in zip(
        torch.autograd.grad((folded * weight).sum(), inputs),
        torch.autograd.grad((literal * weight).sum(), inputs),
        strict=True,
    ):
        assert relative_difference(ours, theirs) < 1e-4
