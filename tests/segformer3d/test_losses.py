"""Losses against formulas written another way, pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from segformer3d.batches import batch_of
from segformer3d.datasets import Sample
from segformer3d.labels import CAMVID_GROUPS, IGNORE_ID
from segformer3d.losses import (
    DEPTH_LOSSES,
    UncertaintyWeights,
    cross_entropy,
    distillation,
    inverse_huber,
    log_l1,
    merge_logits,
    mse,
    outside_delta1,
    relative,
    scale_invariant_log,
    soft_jaccard,
)
from segformer3d.model import DenseOutputs
from segformer3d.objective import Objective
from tests.segformer3d.training_parts import make_recipe


@pytest.fixture
def depths():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64) * 20 + 0.5
    target = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64) * 20 + 0.5
    target[torch.rand(3, 4, 5, generator=generator) < 0.3] = 0
    target[2] = 0
    return depth.requires_grad_(), target


def known_pairs(depth, target):
    pairs = zip(depth.detach().flatten().tolist(), target.flatten().tolist(), strict=True)
    return [(d, t) for d, t in pairs if t > 0]


def test_cross_entropy_is_the_negative_log_probability():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3, 4, requires_grad=True)
    target = torch.randint(0, 5, (2, 3, 4))
    target[0, 0] = IGNORE_ID
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    for class_weights in (None, weights):
        total, weight = 0.0, 0.0
        for b, y, x in np.ndindex(2, 3, 4):
            label = int(target[b, y, x])
            if label != IGNORE_ID:
                p = logits[b, :, y, x].softmax(0)[label].item()
                factor = 1.0 if class_weights is None else float(class_weights[label])
                total, weight = total - factor * math.log(p), weight + factor
        loss = cross_entropy(logits.log_softmax(1), target, class_weights)
        assert loss.total.item() == pytest.approx(total, rel=1e-5)
        assert loss.weight.item() == pytest.approx(weight)


def test_mse(depths):
    loss = mse(*depths)
    pairs = known_pairs(*depths)
    assert loss.total.item() == pytest.approx(sum((d - t) ** 2 for d, t in pairs))
    assert loss.weight == len(pairs)


def test_inverse_huber_as_laina_et_al_write_it(depths):
    pairs = known_pairs(*depths)
    bend = 0.2 * max(abs(d - t) for d, t in pairs)
    expected = 0.0
    for d, t in pairs:
        error = abs(d - t)
        expected += error if error <= bend else (error**2 + bend**2) / (2 * bend)
    loss = inverse_huber(*depths)
    assert loss.total.item() == pytest.approx(expected)
    assert loss.weight == len(pairs)


def test_inverse_huber_has_no_step_at_its_bend():
    target = torch.full((1, 1, 3), 10.0, dtype=torch.float64)
    values = []
    for error in (2.0 - 1e-9, 2.0 + 1e-9):
        depth = target + torch.tensor([0.0, error, 10.0])
        values.append(inverse_huber(depth, target).total.item())
    assert values[0] == pytest.approx(values[1], abs=1e-7)


def test_scale_invariant_log_as_eigen_et_al_write_it(depths):
    depth, target = depths
    expected, frames = 0.0, 0
    for b in range(3):
        pairs = known_pairs(depth[b], target[b])
        if not pairs:
            continue
        logs = [math.log(d) - math.log(t) for d, t in pairs]
        n = len(logs)
        expected += sum(x * x for x in logs) / n - 0.5 * sum(logs) ** 2 / n**2
        frames += 1
    loss = scale_invariant_log(depth, target)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.weight == frames == 2


def test_scale_invariant_log_with_full_focus_ignores_the_scale(depths):
    depth, target = depths
    one = scale_invariant_log(depth, target, focus=1.0).total
    three = scale_invariant_log(3 * depth, target, focus=1.0).total
    assert one.item() == pytest.approx(three.item(), rel=1e-4)


def test_log_l1(depths):
    expected = sum(abs(math.log(d) - math.log(t)) for d, t in known_pairs(*depths))
    assert log_l1(*depths).total.item() == pytest.approx(expected, rel=1e-5)


def test_relative(depths):
    pairs = known_pairs(*depths)
    loss = relative(*depths)
    assert loss.total.item() == pytest.approx(sum(abs(d - t) / t for d, t in pairs), rel=1e-5)
    assert loss.weight == len(pairs)
    loss.total.backward()
    assert not depths[0].grad[depths[1] == 0].any()


def test_outside_delta1_counts_the_pixels_that_are_far_out(depths):
    pairs = known_pairs(*depths)
    loss = outside_delta1(*depths)
    expected = sum(1 - math.exp(-((math.log(d / t) / math.log(1.25)) ** 2) / 2) for d, t in pairs)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.weight == len(pairs)
    loss.total.backward()
    assert not depths[0].grad[depths[1] == 0].any()


def test_outside_delta1_pulls_most_at_the_edge():
    factors = torch.tensor([1.0, 1.1, 1.25, 2.0, 8.0])
    log_depth = factors.log().requires_grad_()
    outside_delta1(log_depth.exp()[None, None], torch.ones(1, 1, 5)).total.backward()
    assert log_depth.grad.argmax() == 2
    assert log_depth.grad[0] == 0
    assert log_depth.grad[4] < 1e-6


@pytest.mark.parametrize("kind", ["mse", "inverse_huber"])
def test_gradients_are_those_of_the_values(kind, depths):
    # The bend moves with the largest error and has no gradient on purpose: hold it still.
    depth, target = depths
    target[0, 0, 0] = 1.0

    def total(x):
        held = x.clone()
        held[0, 0, 0] = 100.0
        return DEPTH_LOSSES[kind](held, target).total

    assert torch.autograd.gradcheck(total, (depth,))


@pytest.mark.parametrize("kind", sorted(DEPTH_LOSSES))
def test_a_batch_without_depth_has_exactly_no_gradient(kind):
    depth = torch.rand(2, 4, 4, requires_grad=True)
    loss = DEPTH_LOSSES[kind](depth, torch.zeros(2, 4, 4))
    loss.total.backward()
    assert (loss.total, loss.weight) == (0, 0)
    assert torch.equal(depth.grad, torch.zeros_like(depth))


@pytest.mark.parametrize("kind", sorted(DEPTH_LOSSES))
def test_unknown_pixels_do_not_matter(kind, depths):
    depth, target = depths
    DEPTH_LOSSES[kind](depth, target).total.backward()
    assert (depth.grad[target == 0] == 0).all()
    assert (depth.grad[target > 0] != 0).any()


def test_distillation_is_the_kullback_leibler_divergence():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 2, 3), torch.randn(2, 4, 2, 3)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    loss = distillation(student, teacher, 2.0)
    assert loss.total.item() == pytest.approx(4 * (p * (p / q).log()).sum().item(), rel=1e-5)
    assert loss.weight == 2 * 2 * 3
    assert distillation(teacher, teacher, 2.0).total.item() == pytest.approx(0, abs=1e-6)


def test_merged_logits_are_the_sums_of_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(3, 19, 2, 2)
    groups = [tuple(range(19)), CAMVID_GROUPS, CAMVID_GROUPS]
    merged = merge_logits(logits, groups).softmax(1)
    p = logits.softmax(1)
    for b, group in enumerate(groups):
        for label in range(19):
            members = [k for k in range(19) if group[k] == label]
            expected = p[b, members].sum(0) if members else torch.zeros(2, 2)
            torch.testing.assert_close(merged[b, label], expected, atol=1e-6, rtol=1e-5)


def one_of_each():
    """A frame with classes only, one with depth only."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    ids = rng.integers(0, 19, (64, 64)).astype(np.uint8)
    depth = rng.uniform(1, 50, (64, 64)).astype(np.float32)
    return [Sample("classes", image, ids, None), Sample("depth", image, None, depth)]


def outputs_of(count):
    torch.manual_seed(0)
    logits = torch.randn(count, 19, 16, 16, requires_grad=True)
    depth = (torch.rand(count, 1, 16, 16) * 20 + 1).requires_grad_()
    return DenseOutputs(logits, depth)


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("kind", sorted(DEPTH_LOSSES))
def test_each_loss_masks_itself(kind, weighting):
    recipe = make_recipe(loss={"depth_kind": kind, "weighting": weighting})
    samples, groups = one_of_each(), tuple(range(19))
    for kept, dark in ((0, "depth"), (1, "logits")):
        objective = Objective(recipe)
        outputs = outputs_of(1)
        total, shown = objective([], outputs, batch_of([samples[kept]], [groups]), torch.zeros(0))
        total.backward()
        gradient = getattr(outputs, dark).grad
        assert torch.equal(gradient, torch.zeros_like(gradient))
        assert torch.isfinite(total)
        assert shown["classes" if dark == "logits" else "depth"] == 0
        if objective.uncertainty is not None:
            task = "classes" if dark == "logits" else "depth"
            assert objective.uncertainty.log_variance[task].grad == 0


def test_mixed_supervision_adds_up():
    recipe = make_recipe(loss={"depth_kind": "mse", "depth": 0.5})
    samples, groups = one_of_each(), tuple(range(19))
    outputs = outputs_of(2)
    total, shown = Objective(recipe)([], outputs, batch_of(samples, [groups] * 2), torch.zeros(0))
    parts = 0.0
    for row, (name, factor) in enumerate((("classes", 1.0), ("depth", 0.5))):
        alone = DenseOutputs(outputs.logits[row : row + 1], outputs.depth[row : row + 1])
        _, values = Objective(recipe)([], alone, batch_of([samples[row]], [groups]), torch.zeros(0))
        assert shown[name].item() == pytest.approx(values[name].item(), rel=1e-5)
        parts += factor * values[name].item()
    assert total.item() == pytest.approx(parts, rel=1e-5)


def test_uncertainty_weights_find_the_losses_size():
    # exp(-s) L + s / 2 is smallest at s = log(2 L).
    weights = UncertaintyWeights(["classes", "depth"])
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.05)
    losses = {"classes": torch.tensor(0.3), "depth": torch.tensor(12.0)}
    for _ in range(600):
        optimizer.zero_grad()
        sum(weights(task, loss, torch.tensor(1.0)) for task, loss in losses.items()).backward()
        optimizer.step()
    for task, loss in losses.items():
        assert weights.log_variance[task].item() == pytest.approx(math.log(2 * loss), abs=0.02)
    assert isinstance(weights, nn.Module)


def test_the_sky_is_drawn_far_away_where_its_depth_is_unknown():
    recipe = make_recipe(loss={"sky_depth_m": 200})
    sample = one_of_each()[0]
    sample.class_ids[:] = 0
    sample.class_ids[:32] = 10
    outputs = outputs_of(1)
    total, shown = Objective(recipe)(
        [], outputs, batch_of([sample], [tuple(range(19))]), torch.zeros(0)
    )
    total.backward()
    assert shown["sky"] > 0
    assert (outputs.depth.grad[0, 0, :7] < 0).all()  # larger depth, smaller loss
    assert (outputs.depth.grad[0, 0, 9:] == 0).all()


def test_outside_delta1_stands_beside_the_depth_loss():
    outputs, batch = outputs_of(2), batch_of(one_of_each(), [tuple(range(19))] * 2)
    plain = Objective(make_recipe()).terms(outputs, batch)
    terms = Objective(make_recipe(loss={"outside_delta1": 3.0})).terms(outputs, batch)
    assert terms.keys() - plain.keys() == {"outside"}
    loss, factor = terms["outside"]
    assert factor == 3
    assert loss.weight == plain["depth"][0].weight > 0
    assert 0 < loss.total <= loss.weight


def test_soft_jaccard_is_the_mean_over_the_classes_that_are_there():
    logits = torch.randn(2, 5, 4, 6, requires_grad=True)
    target = torch.randint(0, 3, (2, 4, 6))
    target[0, :2] = 255
    loss = soft_jaccard(logits.log_softmax(1), target)
    p, known = logits.softmax(1), target != 255
    indices = []
    for k in target[known].unique().tolist():
        is_k = (target == k) & known
        inside = p[:, k][is_k].sum()
        indices.append(inside / (is_k.sum() + p[:, k][known].sum() - inside))
    torch.testing.assert_close(loss.total, 1 - torch.stack(indices).mean())
    assert loss.weight == 1
    loss.total.backward()
    assert torch.equal(logits.grad[0, :, :2], torch.zeros(5, 2, 6))


def test_soft_jaccard_of_a_perfect_guess_and_of_nothing():
    target = torch.randint(0, 5, (1, 8, 8))
    sure = (100.0 * torch.nn.functional.one_hot(target, 5).permute(0, 3, 1, 2)).log_softmax(1)
    assert soft_jaccard(sure, target).total.item() == pytest.approx(0, abs=1e-6)
    unknown = soft_jaccard(sure, torch.full_like(target, 255))
    assert (unknown.total, unknown.weight) == (0, 0)


def test_a_stride_looks_at_one_pixel_of_each_square():
    torch.manual_seed(0)
    samples = [
        Sample(str(i), np.zeros((12, 17, 3), np.uint8), ids, depth)
        for i, (ids, depth) in enumerate(
            (
                torch.randint(0, 19, (12, 17)).numpy().astype(np.uint8),
                torch.rand(12, 17).numpy() * 9 + 1,
            )
            for _ in range(2)
        )
    ]
    batch = batch_of(samples, [tuple(range(19))] * 2, [False, False])
    # Of the size of what is looked at, so that nothing is resized.
    outputs = DenseOutputs(torch.randn(2, 19, 6, 8), torch.rand(2, 1, 6, 8) + 1)
    loss = {"overlap": 0.5, "depth_kind": "log_l1", "stride": 2}
    objective = Objective(make_recipe(loss=loss)).eval()
    terms = objective.terms(outputs, batch)
    log_p, ids = outputs.logits.log_softmax(1), batch.class_ids[:, 1:12:2, 1:16:2]
    expected = {
        "classes": cross_entropy(log_p, ids, None),
        "overlap": soft_jaccard(log_p, ids),
        "depth": log_l1(outputs.depth[:, 0], batch.depth[:, 1:12:2, 1:16:2]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name][0].total, value.total)
    # While learning it is another pixel each time: in the end, all four.
    objective.train()
    totals = {float(objective.terms(outputs, batch)["depth"][0].total) for _ in range(40)}
    assert len(totals) == 4
