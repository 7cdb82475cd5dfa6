"""Rates by layer, schedules against torch's, and the moving average."""

import pytest
import torch

from segformer3d.config import ModelConfig
from segformer3d.model import build_model
from segformer3d.optim import (
    MovingAverage,
    make_optimizer,
    momentum_at,
    rate_at,
    stages_of,
)
from segformer3d.recipe import ModelSection, OptimizerSection, ScheduleSection
from tests.segformer3d.training_parts import TINY


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(ModelSection(variant=TINY, head_width=16).config())


def group_of(optimizer, parameter):
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def test_deeper_layers_learn_faster_and_norms_do_not_decay(model):
    options = OptimizerSection(rate=0.1, layer_decay=0.5, head_rate_factor=10, weight_decay=0.02)
    extra = torch.nn.Parameter(torch.zeros(()))
    optimizer = make_optimizer(model, [extra], options)
    assert isinstance(optimizer, torch.optim.AdamW)
    for stage, factor in enumerate((0.125, 0.25, 0.5, 1.0)):
        block = model.encoder.stages[stage].blocks[0]
        weight, bias = block.ffn.fc1.weight, block.ffn.fc1.bias
        assert group_of(optimizer, weight)["rate_factor"] == factor
        assert group_of(optimizer, weight)["weight_decay"] == 0.02
        assert group_of(optimizer, bias)["weight_decay"] == 0
        assert group_of(optimizer, block.norm1.weight)["weight_decay"] == 0
    assert group_of(optimizer, model.depth_head.predict.weight)["rate_factor"] == 10
    assert group_of(optimizer, extra)["rate_factor"] == 1
    learned = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(learned) == len({id(p) for p in learned}) == len(list(model.parameters())) + 1


@pytest.mark.parametrize("name", ["test_convnext", "resnet18"])
def test_a_timm_encoder_has_stages_too(name):
    torch.manual_seed(0)
    model = build_model(ModelConfig(variant=f"timm:{name}", head_width=16)).train()
    optimizer = make_optimizer(model, [], OptimizerSection(rate=0.1, layer_decay=0.5))
    assert model.encoder.training
    names = {
        "test_convnext": ("stem_0", "stages_1", "stages_2", "stages_3"),
        "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    }[name]
    for start, factor in zip(names, (0.125, 0.25, 0.5, 1.0), strict=True):
        named = model.encoder.model.named_parameters()
        members = [parameter for key, parameter in named if key.startswith(start)]
        assert members
        assert {group_of(optimizer, member)["rate_factor"] for member in members} == {factor}


def test_every_parameter_of_an_encoder_has_a_stage(model):
    found = stages_of(model.encoder)
    assert found == {name: int(name.split(".")[1]) for name, _ in model.encoder.named_parameters()}


def test_what_is_frozen_is_not_learned(model):
    model.encoder.requires_grad_(requires_grad=False)
    optimizer = make_optimizer(model, [], OptimizerSection(kind="adam"))
    assert type(optimizer) is torch.optim.Adam
    learned = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not learned & {id(p) for p in model.encoder.parameters()}


@pytest.mark.parametrize(("num_steps", "rise"), [(100, 0.3), (37, 0.1), (10, 0.5)])
def test_one_cycle_is_torch_s(num_steps, rise):
    options = ScheduleSection(kind="onecycle", rise=rise, start_div=10, momentum=(0.85, 0.95))
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=num_steps, pct_start=rise, div_factor=10
    )
    for step in range(num_steps):
        group = optimizer.param_groups[0]
        assert 1e-2 * rate_at(step, num_steps, options) == pytest.approx(group["lr"], rel=1e-9)
        assert momentum_at(step, num_steps, options) == pytest.approx(group["betas"][0])
        optimizer.step()
        if step < num_steps - 1:
            theirs.step()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_one_cycle_of_very_few_steps(num_steps):
    options = ScheduleSection(kind="onecycle", rise=0.5)
    rates = [rate_at(step, num_steps, options) for step in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_warm_up_and_poly():
    options = ScheduleSection(kind="poly", warm_up_steps=10, power=0.9, floor=0.1)
    rates = [rate_at(step, 110, options) for step in range(110)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[5] == pytest.approx(0.5005)
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.5**0.9)
    assert min(rates[10:]) == 0.1
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    constant = ScheduleSection(kind="constant")
    assert {rate_at(step, 110, constant) for step in range(110)} == {1.0}
    assert momentum_at(3, 110, options) is None


def test_the_average_is_the_recurrence(model):
    average = MovingAverage(model, 0.9)
    name = "depth_head.predict.weight"
    expected = model.state_dict()[name].double().clone()
    for step in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model.depth_head.norm.running_mean.add_(1)
            model.depth_head.norm.num_batches_tracked.add_(1)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.state_dict()[name].double()
    torch.testing.assert_close(average.state_dict()[name].double(), expected)
    assert average.model.depth_head.norm.num_batches_tracked == 30
    assert 20 < average.model.depth_head.norm.running_mean.mean() < 30
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())


def test_what_does_not_move_keeps_its_bits(model):
    average = MovingAverage(model, 0.99)
    for step in range(20):
        average.update(model, step)
    for name, value in model.state_dict().items():
        assert torch.equal(average.state_dict()[name], value)
