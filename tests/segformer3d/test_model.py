from pathlib import Path

import pytest
import torch

from segformer3d.config import ModelConfig
from segformer3d.model import build_model

TINY = ModelConfig(variant="mit:8,16,40,64:1,1,1,1", head_width=16)
NAMES = Path(__file__).parents[1] / "golden" / "state-dict-names.txt"


def test_state_dict_names_are_pinned():
    assert sorted(build_model(TINY).state_dict()) == NAMES.read_text().split()


def test_mit_b3_has_the_size_of_the_origin():
    with torch.device("meta"):
        model = build_model(ModelConfig(variant="mit_b3"))
    assert len(model.state_dict()) == 604
    assert sum(value.numel() for value in model.parameters()) == 45_128_916


def test_outputs_are_at_a_quarter_and_can_be_resized():
    model = build_model(TINY).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        outputs = model(x)
        maps = model.forward_features(x)
    assert [map_.shape[2:] for map_ in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert outputs.logits.shape == (2, 19, 16, 24)
    assert outputs.depth.shape == (2, 1, 16, 24)
    full = outputs.resized((64, 96))
    assert full.logits.shape == (2, 19, 64, 96)
    assert full.depth.shape == (2, 1, 64, 96)
    expected = torch.nn.functional.interpolate(
        outputs.depth, scale_factor=4, mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(full.depth, expected)


@pytest.mark.parametrize(("num_classes", "has_depth"), [(None, True), (7, False)])
def test_a_lacking_head_gives_none(num_classes, has_depth):
    config = ModelConfig(
        variant=TINY.variant, head_width=16, num_classes=num_classes, has_depth=has_depth
    )
    outputs = build_model(config).eval()(torch.randn(1, 3, 32, 32))
    assert (outputs.logits is not None) == (num_classes is not None)
    assert (outputs.depth is not None) == has_depth
    assert (outputs.resized((32, 32)).depth is not None) == has_depth


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = build_model(TINY).train()
    outputs = model(torch.randn(2, 3, 64, 64))
    (outputs.logits.square().mean() + outputs.depth.square().mean()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_timm_encoder_fits_the_heads():
    model = build_model(ModelConfig(variant="timm:test_convnext", head_width=16)).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 96)).logits.shape == (1, 19, 16, 24)
