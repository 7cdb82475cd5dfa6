import numpy as np
import pytest

from segformer3d import draw
from segformer3d.labels import IGNORE_ID, NUM_CLASSES, PALETTE

SIZES = [(1, 1), (5, 7), (95, 63), (96, 64), (321, 181), (2048, 512), (100, 900)]


def random_frame(width_px, height_px):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def striped_class_ids(width_px, height_px):
    columns = np.arange(width_px) * (NUM_CLASSES + 1) // width_px
    ids = np.where(columns < NUM_CLASSES, columns, IGNORE_ID).astype(np.uint8)
    return np.repeat(ids[None], height_px, axis=0)


def test_classes_take_their_palette_colors():
    class_ids = np.array([[0, 13, IGNORE_ID]], np.uint8)
    assert draw.colorize_classes(class_ids).tolist() == [PALETTE[[0, 13, 255]].tolist()]


def test_overlay_mixes_classes_and_keeps_ignored_pixels():
    frame = np.full((1, 2, 3), 100, np.uint8)
    class_ids = np.array([[13, IGNORE_ID]], np.uint8)
    mixed = draw.overlay(frame, class_ids, 0.5)
    assert mixed[0, 0].tolist() == [50, 50, 121]
    assert mixed[0, 1].tolist() == [100, 100, 100]
    assert (draw.overlay(frame, class_ids, 0.0) == frame).all()


def test_nearer_depth_is_brighter_and_invalid_is_dark_grey():
    depth = np.array([[1, 2, 5, 20, 80, 500, 0, -3, np.nan, np.inf]], np.float32)
    picture = draw.colorize_depth(depth, near_m=2, far_m=80)[0]
    assert (picture[0] == picture[1]).all()
    assert (picture[4] == picture[5]).all()
    lightness = picture[1:5].astype(float) @ (0.299, 0.587, 0.114)
    assert (np.diff(lightness) < -10).all()
    assert (picture[6:] == picture[6]).all()
    assert len(set(picture[6].tolist())) == 1


def test_relative_depth_spans_the_ramp_whatever_its_unit():
    depth = np.linspace(1, 2, 200, dtype=np.float32).reshape(10, 20)
    picture = draw.colorize_relative_depth(depth)
    assert (picture == draw.colorize_relative_depth(depth * 1000)).mean() > 0.99
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan])
def test_relative_depth_without_contrast_is_drawn(value):
    assert draw.colorize_relative_depth(np.full((3, 4), value, np.float32)).shape == (3, 4, 3)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 30), (41, 97), (160, 120)])
@pytest.mark.parametrize("invalid", [0.0, -1.0, np.nan, np.inf])
def test_resized_depth_never_mixes_in_invalid_pixels(size, invalid):
    rng = np.random.default_rng(1)
    depth = np.full((30, 40), 7.0, np.float32)
    depth[rng.random(depth.shape) < 0.4] = invalid
    resized = draw.resize_depth(depth, size)
    assert resized.shape == size[::-1]
    assert resized.dtype == np.float32
    assert np.isin(np.round(resized, 4), [0.0, 7.0]).all()


def test_resized_depth_is_invalid_where_the_nearest_pixel_is():
    depth = np.array([[0, 4], [8, 6]], np.float32)
    resized = draw.resize_depth(depth, (8, 8))
    invalid = resized == 0
    assert invalid[:4, :4].all()
    assert invalid.sum() == 16


def test_resized_depth_is_bilinear_where_all_is_valid():
    depth = np.array([[2, 4]], np.float32)
    assert np.allclose(draw.resize_depth(depth, (4, 1)), [[2, 2.5, 3.5, 4]])


def test_resizing_to_the_same_size_changes_valid_pixels_in_nothing():
    depth = np.random.default_rng(2).uniform(1, 90, (9, 11)).astype(np.float32)
    depth[3, 4] = np.nan
    resized = draw.resize_depth(depth, (11, 9))
    assert resized[3, 4] == 0
    assert (np.delete(resized, 3 * 11 + 4) == np.delete(depth, 3 * 11 + 4)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("relative", [False, True])
def test_three_panels_at_any_size(size, relative):
    width_px, height_px = size
    frame, class_ids = random_frame(*size), striped_class_ids(*size)
    depth = np.geomspace(1, 100, 24, dtype=np.float32).reshape(4, 6)
    picture = draw.three_panels(frame, class_ids, depth, relative=relative)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 3 * width_px
    assert picture.shape[0] >= height_px
    assert (picture[:height_px, :width_px] == frame).all()
    overlay = draw.overlay(frame, class_ids)
    assert (picture[:height_px, width_px : 2 * width_px] == overlay).all()


def test_picture_size_depends_on_the_frame_alone():
    frame = random_frame(320, 180)
    few = draw.three_panels(frame, np.zeros((180, 320), np.uint8), None)
    many = draw.three_panels(frame, striped_class_ids(320, 180), np.ones((45, 80), np.float32))
    nothing = draw.three_panels(frame, None, None)
    assert few.shape == many.shape == nothing.shape
    assert few.shape[0] % 2 == 0


def test_missing_heads_give_grey_panels_with_words():
    picture = draw.three_panels(random_frame(320, 180), None, None)
    for left in (320, 640):
        panel = picture[:180, left : left + 320]
        assert (panel == panel[0, 0]).mean() > 0.95
        assert (panel != panel[0, 0]).any()


def test_legend_shows_each_class_present():
    class_ids = np.repeat(np.array([[0, 13, 13, 10, IGNORE_ID]], np.uint8), 4, axis=0)
    picture = draw.legend(class_ids, width_px=600, height_px=80)
    colors = {tuple(color) for color in picture.reshape(-1, 3).tolist()}
    assert {tuple(PALETTE[i].tolist()) for i in (0, 10, 13)} <= colors
    assert tuple(PALETTE[8].tolist()) not in colors


@pytest.mark.parametrize("size", [(1, 1), (40, 16), (3000, 200)])
def test_legend_of_all_classes_fits_any_size(size):
    picture = draw.legend(striped_class_ids(100, 4), width_px=size[0], height_px=size[1])
    assert picture.shape == (size[1], size[0], 3)


def test_legend_keeps_its_order_when_areas_change():
    few, many = np.zeros((4, 9), np.uint8), np.zeros((4, 9), np.uint8)
    few[:, 0], many[:, 1:] = 13, 13
    pictures = [draw.legend(ids, width_px=600, height_px=80) for ids in (few, many)]
    assert (pictures[0] == pictures[1]).all()


def test_one_span_keeps_relative_colors_still():
    depth = np.linspace(1, 2, 200, dtype=np.float32).reshape(10, 20)
    span = draw.relative_span(depth)
    part = draw.colorize_relative_depth(depth[:3], span=span)
    assert (part == draw.colorize_relative_depth(depth)[:3]).all()
    assert span == pytest.approx(np.percentile(depth, (2, 98)))
    assert draw.relative_span(np.zeros((2, 2), np.float32)) is None


def even_map(height=4, width=6):
    return np.full((height, width), 1 / (height * width), np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_attention_grid_at_any_size(size, count):
    maps = [(f"stage 1 head {index}", even_map()) for index in range(count)]
    picture = draw.attention_grid(random_frame(*size), maps, at=(0.5, 0.5))
    assert picture.dtype == np.uint8
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
    other = [("", even_map(1, 1))] * count
    assert draw.attention_grid(random_frame(*size), other).shape == picture.shape


def test_attention_is_brightest_where_the_model_looks_and_the_scale_is_fixed():
    frame = np.zeros((192, 320, 3), np.uint8)
    peaked = np.full((6, 10), 1e-6, np.float32)
    peaked[1, 2] = 1 - peaked.sum()
    even, looked = (
        draw.attention_grid(frame, [("one", map_)])[12:204, :320].astype(float).sum(-1)
        for map_ in (even_map(6, 10), peaked)
    )
    top, left = np.unravel_index(looked.argmax(), looked.shape)
    assert (top // 32, left // 32) == (1, 2)
    assert len(np.unique(even)) == 1
    assert looked[:, 200:].max() < even[0, 0] < looked.max()


def test_the_query_is_marked_in_every_tile():
    frame = random_frame(320, 180)
    maps = [(f"stage 1 head {index}", even_map()) for index in range(4)]
    marked = draw.attention_grid(frame, maps, at=(0.25, 0.5))
    changed = (marked != draw.attention_grid(frame, maps)).any(-1)
    rows, columns = np.nonzero(changed)
    tiles = {(row // 196, column // 324) for row, column in zip(rows, columns, strict=True)}
    assert tiles == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert (rows % 196).mean() == pytest.approx(12 + 90, abs=2)
    assert (columns % 324).mean() == pytest.approx(80, abs=2)


def test_a_message_fits_or_is_left_out():
    assert len(np.unique(draw.message_picture(20, 10, "nothing"))) == 1
    assert len(np.unique(draw.message_picture(400, 200, "nothing"))) > 1
