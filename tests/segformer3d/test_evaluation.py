"""Evaluation with predictors whose answers are known, and once with a real one."""

import json
from dataclasses import replace

import numpy as np
import pytest

from segformer3d.config import METRIC_DEPTH, ORIGIN_DEPTH, ModelConfig, WeightsInfo
from segformer3d.datasets import IDENTITY_GROUPS, DatasetError, Sample
from segformer3d.evaluation import evaluate, measure, save_confusion_picture
from segformer3d.geometry import short_side_of
from segformer3d.metrics import ConfusionMatrix
from segformer3d.predictor import Predictions

INFO = WeightsInfo(config=ModelConfig(), depth_codec=METRIC_DEPTH, training_data="none")


class Frames:
    """Frames of one grey each, which names their class; depth is that grey in metres."""

    groups = IDENTITY_GROUPS

    def __init__(self, samples, depth_kind="metric"):
        self.samples = samples
        self.depth_kind = depth_kind
        self.read = []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.read.append(index)
        return self.samples[index]


def grey(value, size=(48, 80), *, ids=True, depth=True):
    return Sample(
        f"grey {value}",
        np.full((*size, 3), value, np.uint8),
        np.full(size, value, np.uint8) if ids else None,
        np.full(size, value, np.float32) if depth else None,
    )


class Oracle:
    """Reads class and depth off the frame's grey; counts what it is asked."""

    def __init__(self, micro_batch=1, *, codec=METRIC_DEPTH):
        self.batch = micro_batch
        self.codec = codec
        self.asked = []

    def predict(self, frames, *, class_ids_size=None):
        self.asked.append((frames.shape, class_ids_size))
        batch, height, width = frames.shape[:3]
        value = frames[:, 0, 0, 0]
        size = class_ids_size or (height, width)
        ids = np.broadcast_to(value[:, None, None], (batch, *size)).astype(np.uint8)
        quarter = np.broadcast_to(value[:, None, None], (batch, height // 4, width // 4))
        return Predictions(
            class_ids=ids,
            depth=self.codec.encode(quarter.astype(np.float32)) if self.codec else None,
            confidence_mean=None,
            entropy_mean=None,
            finite=np.ones(batch, np.bool_),
        )


def test_a_model_that_is_always_right():
    source = Frames([grey(value) for value in (1, 5, 13)])
    found = evaluate(Oracle(), source, info=INFO, short_side_px=64)
    assert found.classes.mean_iou == found.classes.pixel_accuracy == 1
    assert found.depth.abs_rel == 0
    assert found.depth.delta1 == 1
    assert found.depth.pixels == found.classes.pixels == 3 * 48 * 80
    assert found.notes == ()
    assert json.loads(json.dumps(found.to_dict()))["classes"]["iou"]["fence"] is None
    text = found.text()
    assert "car" in text
    assert "AbsRel" in text
    assert "fence" not in text


def test_frames_have_the_jobs_sizes_and_labels_their_own():
    oracle = Oracle()
    measure(oracle, Frames([grey(1)]), [0], 64)
    # 80 x 48 at a short side of 64: 106.7 -> 96 or 128, the nearest multiple is 96.
    assert oracle.asked == [((1, 64, 96, 3), (48, 80))]


def test_neighbours_of_one_size_share_a_batch():
    sizes = [(48, 80)] * 3 + [(64, 64)] * 2
    oracle = Oracle(micro_batch=2)
    source = Frames([grey(1, size) for size in sizes])
    done = []
    measure(oracle, source, range(5), 64, progress=done.append)
    assert [shape[0] for shape, _ in oracle.asked] == [2, 1, 2]
    assert done == [2, 3, 5]


def test_shares_of_ranks_add_up():
    source = Frames([grey(value) for value in range(7)])
    classes, depth = measure(Oracle(), source, range(7), 64)
    parts = [measure(Oracle(), source, range(rank, 7, 3), 64) for rank in range(3)]
    for other in parts[1:]:
        parts[0][0].merge(other[0])
        parts[0][1].merge(other[1])
    assert np.array_equal(parts[0][0].counts, classes.counts)
    assert parts[0][1].to_dict() == pytest.approx(depth.to_dict())


def test_a_callable_will_do():
    classes, depth = measure(Oracle().predict, Frames([grey(4)]), [0], 32)
    assert classes.mean_iou == 1
    assert depth.abs_rel == 0


def test_missing_supervision():
    source = Frames([grey(1, ids=False), grey(2, depth=False), grey(3, ids=False, depth=False)])
    found = evaluate(Oracle(), source, info=INFO, short_side_px=32)
    assert found.classes.pixels == found.depth.pixels == 48 * 80
    none = evaluate(Oracle(), Frames([source[2]]), info=INFO)
    assert (none.classes, none.depth) == (None, None)
    assert "no class labels" in none.text()
    assert "no depth" in none.text()
    assert none.short_side_px == 512


def test_relative_depth_is_left_out_and_said_so():
    relative = replace(INFO, depth_codec=ORIGIN_DEPTH)
    found = evaluate(Oracle(codec=ORIGIN_DEPTH), Frames([grey(1)]), info=relative)
    assert found.depth is None
    assert "weights' depth is relative" in found.notes[0]
    found = evaluate(Oracle(), Frames([grey(1)], "relative"), info=INFO)
    assert found.depth is None
    assert "data set's depth is relative" in found.notes[0]


def test_weights_without_a_head_or_with_other_classes():
    config = ModelConfig(num_classes=None)
    found = evaluate(Oracle(), Frames([grey(1, ids=False)]), info=replace(INFO, config=config))
    assert "no segmentation head" in found.notes[0]
    config = ModelConfig(num_classes=5)
    found = evaluate(Oracle(), Frames([grey(1)]), info=replace(INFO, config=config))
    assert found.classes is None
    assert "5 classes" in found.notes[0]
    config = ModelConfig(has_depth=False)
    info = replace(INFO, config=config, depth_codec=None)
    found = evaluate(Oracle(codec=None), Frames([grey(1)]), info=info)
    assert "no depth head" in found.notes[0]


def test_a_limit_is_spread_evenly():
    source = Frames([grey(1)] * 10)
    assert evaluate(Oracle(), source, info=INFO, short_side_px=32, limit=4).num_frames == 4
    assert source.read == [0, 2, 5, 7]
    assert evaluate(Oracle(), source, info=INFO, short_side_px=32, limit=99).num_frames == 10


def test_the_depth_cap():
    source = Frames([grey(10), grey(60)])
    found = evaluate(Oracle(), source, info=INFO, short_side_px=32, depth_cap_m=50)
    assert found.depth.pixels == 48 * 80


def test_depth_that_is_missing_is_said():
    class Blind(Oracle):
        def predict(self, frames, *, class_ids_size=None):
            said = super().predict(frames, class_ids_size=class_ids_size)
            return replace(said, depth=np.zeros_like(said.depth))

    found = evaluate(Blind(), Frames([grey(9)]), info=INFO, short_side_px=32)
    assert found.depth.missing == 48 * 80
    assert found.depth.delta3 == 0
    assert "100.00% of the pixels got no depth" in found.text()


def test_a_frame_that_no_input_fits_is_named():
    with pytest.raises(DatasetError, match="grey 1: 900x4 is longer"):
        measure(Oracle(), Frames([grey(1, (4, 900))]), [0], 64)


def test_sides_are_rounded_to_what_the_model_takes():
    assert [short_side_of(side) for side in (1, 32, 360, 375, 512)] == [32, 32, 352, 384, 512]
    info = replace(INFO, short_side_px=70)
    assert evaluate(Oracle(), Frames([grey(1)]), info=info).short_side_px == 64


def test_the_picture(tmp_path):
    import cv2

    matrix = ConfusionMatrix()
    rng = np.random.default_rng(0)
    target = rng.integers(0, 12, (64, 64), np.uint8)
    matrix.update(np.where(rng.random((64, 64)) < 0.7, target, 255).astype(np.uint8), target)
    save_confusion_picture(matrix, tmp_path / "confusion.png")
    picture = cv2.imread(str(tmp_path / "confusion.png"))
    assert min(picture.shape[:2]) > 400
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_a_real_predictor():
    from segformer3d.predictor import Predictor
    from segformer3d.weights import model_from_bytes, untrained_weights

    model, info = model_from_bytes(untrained_weights("mit:16,32,80,128:1,1,1,1"))
    predictor = Predictor(model, info, device="cpu")
    source = Frames([grey(value) for value in (1, 5)])
    found = evaluate(predictor, source, info=info, short_side_px=32)
    assert 0 <= found.classes.mean_iou <= 1
    assert found.depth.pixels == 2 * 48 * 80
    assert found.depth.rmse > 0
