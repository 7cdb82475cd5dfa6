import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.geometry import Geometry, Orientation, input_size, resize
from tests.media import picture

SIDES = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1920, 1080, (896, 512)),
        (1080, 1920, (512, 896)),
        (960, 540, (896, 512)),
        (480, 360, (672, 512)),
        (1, 1, (512, 512)),
        (800, 100, (4096, 512)),
    ],
)
def test_keep_aspect_sizes(width, height, expected):
    assert input_size(width, height, Geometry()) == expected


def test_rounds_halves_up():
    assert input_size(33, 32, Geometry(short_side_px=512)) == (512 + 32, 512)
    assert input_size(65, 64, Geometry(short_side_px=1024)) == (1024 + 32, 1024)


@given(width=SIDES, height=SIDES, multiple=st.integers(1, 40))
def test_sides_are_multiples_of_32_and_close(width, height, multiple):
    geometry = Geometry(short_side_px=32 * multiple)
    if max(width, height) > 8 * min(width, height):
        with pytest.raises(InputError, match="longer than 8 times") as caught:
            input_size(width, height, geometry)
        assert caught.value.kind == "too_large"
        return
    size = input_size(width, height, geometry)
    assert min(size) == geometry.short_side_px
    scale = geometry.short_side_px / min(width, height)
    for side, original in zip(size, (width, height), strict=True):
        assert side % 32 == 0
        assert abs(side - original * scale) <= 16


def test_stretch_ignores_the_aspect_ratio():
    assert input_size(10_000, 10, Geometry(mode="stretch")) == (1024, 512)


def test_no_pixels_is_an_input_error():
    with pytest.raises(InputError, match="no pixels"):
        input_size(0, 10, Geometry())


@pytest.mark.parametrize(
    "wrong", [{"short_side_px": 500}, {"stretch_size": (1024, 0)}, {"mode": "crop"}]
)
def test_wrong_geometry_is_refused(wrong):
    with pytest.raises(ValueError, match=r"multiples of 32|unknown geometry"):
        Geometry(**wrong)


def test_resize_averages_down_and_interpolates_up():
    checks = np.zeros((64, 64, 3), np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 200
    assert np.all(resize(checks, (32, 32)) == 100)
    ramp = np.repeat(np.array([[0, 100]], np.uint8)[..., None], 3, axis=2)
    assert resize(ramp, (4, 1))[0, :, 0].tolist() == [0, 25, 75, 100]


@pytest.mark.parametrize("size", [(96, 64), (64, 32), (128, 96), (128, 32)])
def test_resize_into_an_array_is_the_same(size):
    frame = picture()
    out = np.empty((size[1], size[0], 3), np.uint8)
    assert resize(frame, size, out=out) is not frame
    assert np.array_equal(out, resize(frame, size))


def test_exif_orientations_follow_the_standard():
    # Row by row: where the stored frame's corners end up, from the EXIF specification.
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    expected = {
        1: stored,
        2: np.fliplr(stored),
        3: np.rot90(stored, 2),
        4: np.flipud(stored),
        5: stored.T,
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).T,
        8: np.rot90(stored),
    }
    for tag, upright in expected.items():
        orientation = Orientation.from_exif(tag)
        frame = np.repeat(stored[..., None], 3, axis=2)
        assert np.array_equal(orientation.apply(frame)[..., 0], upright), tag
        assert orientation.size(3, 2) == upright.shape[::-1]
    assert Orientation.from_exif(None) == Orientation.from_exif(9) == Orientation()


@pytest.mark.parametrize(
    ("turns", "matrix"),
    [
        (0, (1, 0, 0, 1)),
        (1, (0, -1, 1, 0)),
        (2, (-1, 0, 0, -1)),
        (3, (0, 1, -1, 0)),
    ],
)
def test_display_matrices_turn_counterclockwise(turns, matrix):
    a, b, c, d = (value << 16 for value in matrix)
    data = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], np.int32).tobytes()
    orientation = Orientation.from_display_matrix(data)
    frame = picture(5, 4)
    assert np.array_equal(orientation.apply(frame), np.rot90(frame, turns))
    assert orientation.rotation_deg == 90 * turns
