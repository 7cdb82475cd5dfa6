"""The metrics against torchmetrics, against values computed by hand, and merged in any order."""

import itertools
import math
import pickle

import numpy as np
import pytest

from segformer3d.labels import CAMVID_GROUPS
from segformer3d.metrics import ConfusionMatrix, DepthErrors


def noisy_labels(seed, *, absent=()):
    """Labels with ignored pixels, and predictions that are right for about half of them."""
    rng = np.random.default_rng(seed)
    present = np.setdiff1d(np.arange(19), absent).astype(np.uint8)
    target = rng.choice(present, (3, 40, 50))
    predicted = np.where(rng.random(target.shape) < 0.5, target, rng.choice(present, target.shape))
    target[rng.random(target.shape) < 0.1] = 255
    return predicted.astype(np.uint8), target


@pytest.mark.parametrize("absent", [(), (3, 16, 17)])
def test_iou_and_accuracy_equal_torchmetrics(absent):
    import torch
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_jaccard_index,
    )

    predicted, target = noisy_labels(0, absent=absent)
    matrix = ConfusionMatrix()
    for frame in range(len(target)):
        matrix.update(predicted[frame], target[frame])
    pair = torch.from_numpy(predicted).long(), torch.from_numpy(target).long()
    options = {"num_classes": 19, "ignore_index": 255}
    theirs = multiclass_jaccard_index(*pair, average="none", **options).numpy()
    ours = matrix.iou()
    assert np.isnan(ours[list(absent)]).all()
    kept = np.setdiff1d(np.arange(19), absent)
    np.testing.assert_allclose(ours[kept], theirs[kept], rtol=1e-6)
    macro = multiclass_jaccard_index(*pair, average="macro", **options)
    assert matrix.mean_iou == pytest.approx(float(macro), rel=1e-6)
    micro = multiclass_accuracy(*pair, average="micro", **options)
    assert matrix.pixel_accuracy == pytest.approx(float(micro), rel=1e-6)


def test_a_tiny_matrix_by_hand():
    matrix = ConfusionMatrix(3)
    target = np.array([[0, 0, 1], [1, 255, 0]], np.uint8)
    predicted = np.array([[0, 1, 1], [255, 2, 2]], np.uint8)
    matrix.update(predicted, target)
    assert matrix.counts.tolist() == [[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    # Class 0: 1 hit of 3; class 1: 1 hit, 1 missed, 1 false; class 2 is only predicted.
    assert matrix.iou().tolist() == [1 / 3, 1 / 3, 0]
    assert matrix.mean_iou == 1 / 3
    assert matrix.pixel_accuracy == 2 / 5


def test_groups_count_a_wall_as_building():
    matrix = ConfusionMatrix(groups=CAMVID_GROUPS)
    predicted = np.array([3, 2, 17, 18, 12, 15], np.uint8)
    target = np.array([2, 2, 12, 12, 12, 13], np.uint8)
    matrix.update(predicted, target)
    assert matrix.mean_iou == matrix.pixel_accuracy == 1
    assert np.isnan(matrix.iou()[3])


def test_nothing_counted():
    matrix = ConfusionMatrix()
    matrix.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
    assert math.isnan(matrix.mean_iou)
    assert matrix.to_dict()["mean_iou"] is None
    errors = DepthErrors()
    errors.update(np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32))
    assert errors.to_dict()["abs_rel"] is None
    assert errors.to_dict()["delta1"] is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_merge_in_any_order(order):
    predicted, target = noisy_labels(1)
    whole, merged = ConfusionMatrix(), ConfusionMatrix()
    whole.update(predicted, target)
    depth_whole, depth_merged = DepthErrors(), DepthErrors()
    depths = [depth_pair(seed) for seed in range(3)]
    for guess, true in depths:
        depth_whole.update(guess, true)
    for place in order:
        part = ConfusionMatrix()
        part.update(predicted[place], target[place])
        merged.merge(pickle.loads(pickle.dumps(part)))  # noqa: S301
        depth_part = DepthErrors()
        depth_part.update(*depths[place])
        depth_merged.merge(pickle.loads(pickle.dumps(depth_part)))  # noqa: S301
    assert np.array_equal(whole.counts, merged.counts)
    assert whole.to_dict() == merged.to_dict()
    assert depth_merged.to_dict() == pytest.approx(depth_whole.to_dict(), rel=1e-12)
    counted = ("pixels", "missing", "delta1", "delta2", "delta3")
    assert [getattr(depth_merged, n) for n in counted] == [getattr(depth_whole, n) for n in counted]


def depth_pair(seed):
    rng = np.random.default_rng(seed)
    true = rng.uniform(0.5, 100, (20, 30)).astype(np.float32)
    guess = (true * rng.uniform(0.5, 2, true.shape)).astype(np.float32)
    true[rng.random(true.shape) < 0.2] = 0
    guess[rng.random(true.shape) < 0.05] = np.nan
    return guess, true


def test_depth_errors_by_hand():
    errors = DepthErrors()
    # Ratios 1, 2 and 1.2; what follows is out of range, unknown or not a number.
    true = np.array([10, 2, 5, 80, 0, np.nan, np.inf, -1], np.float32)
    guess = np.array([10, 4, 6, 80, 1, 1, 1, 1], np.float32)
    errors.update(guess, true)
    assert errors.pixels == 3
    assert errors.abs_rel == pytest.approx((0 + 1 + 0.2) / 3)
    assert errors.sq_rel == pytest.approx((0 + 2 + 0.2) / 3)
    assert errors.rmse == pytest.approx(math.sqrt((0 + 4 + 1) / 3))
    assert errors.rmse_log == pytest.approx(math.sqrt((math.log(2) ** 2 + math.log(1.2) ** 2) / 3))
    assert (errors.delta1, errors.delta2) == (2 / 3, 2 / 3)
    # 1.25^3 is 1.953: a factor of two is beyond all three.
    assert errors.delta3 == 2 / 3


def test_depth_errors_equal_torchmetrics():
    import torch
    from torchmetrics.functional import mean_absolute_percentage_error, mean_squared_error

    true = np.random.default_rng(0).uniform(1, 79, (30, 40)).astype(np.float32)
    guess = np.random.default_rng(1).uniform(1, 79, (30, 40)).astype(np.float32)
    errors = DepthErrors()
    errors.update(guess, true)
    pair = torch.from_numpy(guess), torch.from_numpy(true)
    assert errors.abs_rel == pytest.approx(float(mean_absolute_percentage_error(*pair)), rel=1e-5)
    rmse = mean_squared_error(*pair, squared=False)
    assert errors.rmse == pytest.approx(float(rmse), rel=1e-5)
    logs = mean_squared_error(pair[0].log(), pair[1].log(), squared=False)
    assert errors.rmse_log == pytest.approx(float(logs), rel=1e-5)


def test_predictions_are_clipped_to_the_range():
    errors = DepthErrors(max_m=80)
    errors.update(np.array([1000.0], np.float32), np.array([40.0], np.float32))
    assert errors.rmse == 40


def test_missing_predictions_are_counted_and_wrong():
    errors = DepthErrors()
    guess = np.array([5, 0, -1, np.nan, np.inf], np.float32)
    errors.update(guess, np.full(5, 5, np.float32))
    assert (errors.pixels, errors.missing) == (1, 4)
    assert errors.delta1 == errors.delta3 == 1 / 5
    assert errors.abs_rel == 0


def test_what_does_not_fit_is_refused():
    matrix = ConfusionMatrix()
    ids = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="differ"):
        matrix.update(ids, ids[:1])
    with pytest.raises(ValueError, match="uint8"):
        matrix.update(ids.astype(np.int64), ids)
    with pytest.raises(ValueError, match="merge"):
        matrix.merge(ConfusionMatrix(3))
    with pytest.raises(ValueError, match="groups"):
        ConfusionMatrix(3, groups=(0, 1))
    with pytest.raises(ValueError, match="num_classes"):
        ConfusionMatrix(256)
    errors = DepthErrors()
    with pytest.raises(ValueError, match="differ"):
        errors.update(np.ones(2, np.float32), np.ones(3, np.float32))
    with pytest.raises(ValueError, match="merge"):
        errors.merge(DepthErrors(max_m=50))
    with pytest.raises(ValueError, match="min_m"):
        DepthErrors(2, 1)
