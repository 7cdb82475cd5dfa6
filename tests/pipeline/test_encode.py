"""PNG bytes hold class ids and depth codes exactly."""

from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.encode import decode_class_ids, decode_depth, encode_png


def test_class_ids_round_trip():
    class_ids = np.random.default_rng(0).integers(0, 256, (33, 17), np.uint8)
    assert np.array_equal(decode_class_ids(encode_png(class_ids)), class_ids)


def test_depth_round_trip():
    depth = np.random.default_rng(0).integers(0, 65536, (33, 17), np.uint16)
    assert np.array_equal(decode_depth(encode_png(depth)), depth)


def test_colours_are_rgb():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    data = np.frombuffer(encode_png(red), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.float32), np.zeros((0, 2), np.uint8)])
def test_what_png_cannot_hold(array):
    with pytest.raises(ValueError, match="PNG holds"):
        encode_png(array)


def test_the_wrong_kind_of_png():
    depth = encode_png(np.zeros((2, 2), np.uint16))
    with pytest.raises(ValueError, match="uint8 PNG"):
        decode_class_ids(depth)
    with pytest.raises(ValueError, match="uint16 PNG"):
        decode_depth(b"no png")


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (64, 96), (31, 45, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_other_readers_see_the_same(shape, dtype):
    if len(shape) == 3 and dtype is np.uint16:
        pytest.skip("no 16-bit colours")
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (2, *shape), dtype)
    for array in (values[0], values[:, ::-1][1], np.zeros(shape, dtype)):
        with Image.open(BytesIO(encode_png(array))) as image:
            image.verify()
        with Image.open(BytesIO(encode_png(array))) as image:
            assert np.array_equal(np.asarray(image), array)
        seen = cv2.imdecode(np.frombuffer(encode_png(array), np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(seen[..., ::-1] if array.ndim == 3 else seen, array)
