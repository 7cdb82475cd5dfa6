"""PNG bytes hold class ids and depth codes exactly."""

import struct
import tracemalloc
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.encode import (
    decode_class_ids,
    decode_depth,
    encode_png,
    is_same_png,
    resize_class_ids,
    resize_depth_codes,
)


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


def deflated_anew(png, level=9):
    """The same picture by another deflate."""
    pixels = zlib.compress(zlib.decompress(png[41:-16]), level)
    chunk = b"IDAT" + pixels
    body = struct.pack(">I", len(pixels)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + body + png[-12:]


def test_the_same_png_by_another_deflate():
    png = encode_png(np.arange(600, dtype=np.uint8).reshape(20, 30))
    other = deflated_anew(png)
    assert other != png
    assert is_same_png(png, png)
    assert is_same_png(other, png)


def test_another_png_is_not_the_same():
    picture = np.arange(600, dtype=np.uint8).reshape(20, 30)
    png = encode_png(picture)
    bomb = deflated_anew(png).replace(png[16:24], struct.pack(">II", 30, 21))
    changed = picture.copy()
    changed[3, 4] ^= 1
    others = [encode_png(changed), encode_png(picture.T.copy()), b"", png[:40], png + b"\n", bomb]
    others += [
        png[:place] + bytes([png[place] ^ 1]) + png[place + 1 :] for place in range(len(png))
    ]
    others += [deflated_anew(encode_png(changed)), deflated_anew(png)[:-13] + png[-13:]]
    assert not any(is_same_png(other, png) for other in others)


def test_a_deflated_bomb_is_not_inflated():
    png = encode_png(np.zeros((20, 30), np.uint8))
    pixels = zlib.compress(bytes(200_000_000), 9)
    chunk = b"IDAT" + pixels
    body = struct.pack(">I", len(pixels)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    tracemalloc.start()
    try:
        assert not is_same_png(png[:33] + body + png[-12:], png)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(0, 5), (-1, 5), (2**31 - 1, 2**31 - 1), (20_000, 20_000)])
def test_a_size_that_no_frame_has_is_refused(size):
    with pytest.raises(ValueError, match=f"no frame has {size[0]}x{size[1]} pixels"):
        resize_class_ids(np.zeros((2, 3), np.uint8), size)
    with pytest.raises(ValueError, match="no frame has"):
        resize_depth_codes(np.ones((2, 3), np.uint16), size)


def test_a_png_that_says_it_is_huge_is_not_unpacked():
    png = encode_png(np.zeros((4, 4), np.uint8))
    huge = b"IHDR" + struct.pack(">II", 20_000, 20_000) + png[24:29]
    with pytest.raises(ValueError, match="no frame has 20000x20000 pixels"):
        decode_class_ids(png[:12] + huge + struct.pack(">I", zlib.crc32(huge)) + png[33:])


def test_what_is_no_png_is_not_read_as_another_picture():
    _, data = cv2.imencode(".bmp", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="not a single-channel"):
        decode_class_ids(data.tobytes())
