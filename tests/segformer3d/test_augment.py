"""Augmentation: image, class ids and depth stay aligned, and depth follows the zoom."""

import numpy as np
import pytest

from segformer3d.augment import Augmentation, augment, resized
from segformer3d.datasets import Sample
from segformer3d.labels import IGNORE_ID

HEIGHT, WIDTH = 96, 160


def coded(*, height=HEIGHT, width=WIDTH):
    """Every plane tells the pixel's place: red the row, green the column; so do ids and depth."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)
    ids = (rows // 16 + columns // 16 * 2).astype(np.uint8) % 19
    depth = (1000 + rows + columns / 1000).astype(np.float32)
    return Sample("coded", image, ids, depth)


def cut(options, *, seed=0, crop=(64, 64), short=HEIGHT, sample=None):
    rng = np.random.default_rng(seed)
    return augment(sample or coded(), rng, options, short_side_px=short, crop_px=crop)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_without_a_zoom_a_crop_is_a_window(seed, flip):
    crop = cut(Augmentation(flip=flip), seed=seed)
    whole = coded()
    if flip:
        crop = Sample("", crop.image[:, ::-1], crop.class_ids[:, ::-1], crop.depth[:, ::-1])
    top, left = (int(x) for x in crop.image[0, 0, :2])
    window = (slice(top, top + 64), slice(left, left + 64))
    np.testing.assert_array_equal(crop.image, whole.image[window])
    np.testing.assert_array_equal(crop.class_ids, whole.class_ids[window])
    np.testing.assert_array_equal(crop.depth, whole.depth[window])


@pytest.mark.parametrize("seed", range(12))
def test_planes_stay_aligned_under_every_geometric_change(seed):
    options = Augmentation(scale=(0.5, 2.0), stretch=0.2, flip=0.5, focus=0.5)
    crop = cut(options, seed=seed)
    rows, columns = crop.image[..., 0].astype(float), crop.image[..., 1].astype(float)
    inside = crop.depth > 0
    assert inside.any()
    zoom = 1000 / crop.depth[inside].min()
    depth_rows = np.floor(crop.depth * zoom) - np.floor(crop.depth[inside].min() * zoom)
    # Away from the padding, whose grey is mixed in at its border.
    core = inside.copy()
    for axis in (0, 1):
        for shift in (-3, 3):
            core &= np.roll(inside, shift, axis)
    core[:3] = core[-3:] = core[:, :3] = core[:, -3:] = False
    if not core.any():
        pytest.skip("all of it is near the border")
    spread = np.abs((depth_rows - rows)[core] - np.median((depth_rows - rows)[core]))
    assert spread.max() <= 4
    expected = (rows // 16 + columns // 16 * 2) % 19
    border = (np.minimum(rows % 16, 16 - rows % 16) < 3) | (
        np.minimum(columns % 16, 16 - columns % 16) < 3
    )
    np.testing.assert_array_equal(crop.class_ids[core & ~border], expected[core & ~border])
    np.testing.assert_array_equal(crop.class_ids == IGNORE_ID, ~inside)


@pytest.mark.parametrize("zoom", [0.5, 1.0, 2.0])
def test_depth_is_divided_by_the_zoom(zoom):
    sample = coded()
    sample.depth[:] = 30
    crop = cut(Augmentation(scale=(zoom, zoom)), sample=sample)
    assert set(np.unique(crop.depth)) <= {np.float32(0), np.float32(30 / zoom)}
    kept = cut(Augmentation(scale=(zoom, zoom), rescale_depth=False), sample=sample)
    assert set(np.unique(kept.depth)) <= {np.float32(0), np.float32(30)}


def test_depth_is_that_of_the_training_s_short_side():
    """A frame of another size is resized first; that is no zoom."""
    sample = coded(height=2 * HEIGHT, width=250)
    sample.depth[:] = 30
    assert (cut(Augmentation(), sample=sample).depth == 30).all()


def test_what_reaches_beyond_the_frame_is_unlabelled():
    crop = cut(Augmentation(scale=(0.5, 0.5)), crop=(64, 96))
    outside = crop.depth == 0
    assert 0.2 < outside.mean() < 0.6
    assert (crop.class_ids[outside] == IGNORE_ID).all()
    assert (crop.class_ids[~outside] != IGNORE_ID).all()
    assert (crop.image[outside][:, 2] > 7).mean() > 0.95


def test_what_is_missing_stays_missing():
    whole = coded()
    crop = cut(Augmentation(flip=1.0), sample=Sample("", whole.image))
    assert crop.class_ids is None
    assert crop.depth is None


def test_colours_change_and_labels_do_not():
    options = Augmentation(colour=1.0, blur=1.0)
    plain, varied = cut(Augmentation(), seed=3), cut(options, seed=3)
    np.testing.assert_array_equal(plain.class_ids, varied.class_ids)
    np.testing.assert_array_equal(plain.depth, varied.depth)
    assert (plain.image != varied.image).mean() > 0.5


def test_focus_finds_a_rare_class():
    sample = coded()
    sample.class_ids[:] = 0
    sample.class_ids[40:48, 120:128] = 18

    def hits(options):
        crops = (cut(options, seed=seed, crop=(32, 32), sample=sample) for seed in range(100))
        return sum((crop.class_ids == 18).any() for crop in crops)

    assert hits(Augmentation(focus=1.0)) > 35 > 2 * hits(Augmentation()) > 0


def test_the_same_chance_the_same_crop_and_read_only_arrays_pass():
    sample = coded()
    for plane in (sample.image, sample.class_ids, sample.depth):
        plane.flags.writeable = False
    options = Augmentation(scale=(0.5, 2), stretch=0.2, flip=0.5, colour=0.5, blur=0.5, focus=0.5)
    one, two = cut(options, seed=5, sample=sample), cut(options, seed=5, sample=sample)
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.depth, two.depth)


def test_a_whole_sample_is_resized():
    small = resized(coded(), (48, 80))
    assert small.image.shape == (48, 80, 3)
    assert small.depth.shape == small.class_ids.shape == (48, 80)
    assert set(np.unique(small.depth)) <= set(np.unique(coded().depth))


@pytest.mark.parametrize(
    "fields", [{"scale": (2, 1)}, {"scale": (0, 1)}, {"flip": 2}, {"stretch": -1}]
)
def test_nonsense_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Augmentation(**fields)
