"""The weights in the box: they are there, they say what they are, and they see."""

import numpy as np
import pytest

from segformer3d.datasets import open_dataset
from segformer3d.evaluation import measure
from segformer3d.labels import CLASS_NAMES
from segformer3d.predictor import Predictor
from segformer3d.weights import model_from_bytes
from segformer3d.weights_file import bundled_weights

SIZE_MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def bundled():
    return model_from_bytes(bundled_weights())


def test_they_are_small_half_precision_mit_b0(bundled):
    data = bundled_weights()
    assert len(data) < SIZE_MAX_BYTES
    model, info = bundled
    assert (info.config.variant, info.config.num_classes, info.config.has_depth) == (
        "mit_b0",
        19,
        True,
    )
    assert info.trained
    num_floats = sum(value.numel() for value in model.parameters())
    assert len(data) < 2.2 * num_floats


def test_their_card_says_what_they_are(bundled):
    _, info = bundled
    assert "CamVid" in info.training_data
    assert "scenes" in info.training_data
    assert "trying out" in info.terms
    assert {"camvid.mean_iou", "scenes.mean_iou", "scenes.abs_rel", "scenes.delta1"} <= set(
        info.quality
    )


def test_they_see_scenes_that_nobody_trained_on(bundled):
    """About as well as their card says; loose, since a few scenes are a small sample."""
    model, info = bundled
    predictor = Predictor(model, info, device="cpu")
    source = open_dataset("scenes:?first_seed=777000&count=6")
    classes, depths = measure(predictor, source, range(6), info.short_side_px)
    iou = dict(zip(CLASS_NAMES, classes.iou(), strict=True))
    assert iou["road"] > 0.85
    assert iou["sky"] > 0.85
    assert iou["building"] > 0.7
    assert classes.pixel_accuracy > 0.8
    assert depths.abs_rel < 2 * info.quality["scenes.abs_rel"]
    assert depths.delta1 > info.quality["scenes.delta1"] - 0.2


def test_near_road_is_nearer_than_far_road(bundled):
    model, info = bundled
    predictor = Predictor(model, info, device="cpu")
    sample = open_dataset("scenes:?first_seed=777100&count=1")[0]
    frame = np.ascontiguousarray(sample.image[:352])
    depth = info.depth_codec.decode(predictor.predict(frame[None]).depth)[0]
    road = sample.class_ids[:352:4, ::4] == CLASS_NAMES.index("road")
    rows = np.flatnonzero(road.sum(axis=1) > 10)
    means = [float(depth[row][road[row]].mean()) for row in rows]
    assert means[0] > 2 * means[-1]
