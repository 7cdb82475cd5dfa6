"""JPEG 2000 in all its kinds: right, or typed."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.sources.images import decode_image
from tests.media import picture
from tests.pipeline.image_parts import LIMITS, distance, kind_of, pixels_of


def jp2(image=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(picture()) if image is None else image
    image.save(buffer, "JPEG2000", **options)
    return buffer.getvalue()


def ffmpeg_jp2(pix_fmt, format="jp2"):
    """By another encoder, which knows of subsampled colours and of other depths."""
    context = av.CodecContext.create("jpeg2000", "w")
    context.width, context.height, context.pix_fmt = 96, 64, pix_fmt
    context.time_base, context.options = Fraction(1, 25), {"format": format}
    frame = av.VideoFrame.from_ndarray(picture(), "rgb24").reformat(format=pix_fmt)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def grey(pixels):
    return np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("mode", "bare"),
    [
        *((mode, bare) for mode in ("L", "LA", "RGB", "RGBA") for bare in (False, True)),
        ("CMYK", False),
    ],
)
def test_modes(mode, bare):
    data = jp2(Image.fromarray(picture()).convert(mode), no_jp2=bare)
    expected = grey(picture()) if mode in {"L", "LA"} else picture()
    assert np.array_equal(pixels_of(data), expected)


def test_luma_and_chroma_become_rgb():
    bars = np.zeros((64, 96, 3), np.uint8)
    colours = [(200, 30, 40), (40, 200, 30), (30, 40, 200), (128, 128, 128), (200, 180, 30)]
    for place, colour in enumerate(colours):
        bars[:, 16 * place : 16 * place + 16] = colour
    pixels = pixels_of(jp2(Image.fromarray(bars).convert("YCbCr")))
    assert np.abs(pixels.astype(int) - bars).max() <= 3


@pytest.mark.parametrize("format", ["jp2", "j2k"])
@pytest.mark.parametrize("pix_fmt", ["yuv422p", "yuv420p", "yuv420p10le"])
def test_subsampled_colours_become_rgb(pix_fmt, format):
    # FFmpeg writes video's range of 16 to 235 without saying so.
    pixels = pixels_of(ffmpeg_jp2(pix_fmt, format))
    assert distance(np.clip((pixels.astype(float) - 16) * 255 / 219, 0, 255), picture()) < 6


@pytest.mark.parametrize("format", ["jp2", "j2k"])
@pytest.mark.parametrize("pix_fmt", ["gray10le", "gray12le", "gray16le", "rgb48le", "rgba64le"])
def test_deep_samples_become_8_bits(pix_fmt, format):
    expected = grey(picture()) if pix_fmt.startswith("gray") else picture()
    assert distance(pixels_of(ffmpeg_jp2(pix_fmt, format)), expected) < 1


def test_16_bits_keep_the_high_byte():
    values = picture()[..., 0]
    data = jp2(Image.fromarray(values.astype(np.uint16) << 8 | 200))
    assert np.array_equal(pixels_of(data), np.repeat(values[..., None], 3, axis=2))


def test_an_image_may_lie_anywhere_on_its_grid():
    data = jp2(tile_size=(32, 32), offset=(5, 7), tile_offset=(0, 0))
    assert np.array_equal(pixels_of(data), picture())
    assert decode_image(data, LIMITS)[1] == (96, 64)


def test_what_would_be_other_colours_is_unsupported():
    assert kind_of(jp2(signed=True)) == "unsupported"
    data = bytearray(jp2())
    struct.pack_into(">I", data, data.index(b"colr") + 7, 14)  # CIELab
    assert kind_of(bytes(data)) == "unsupported"
    data[data.index(b"colr") + 4] = 2  # a profile, of which nothing is there
    assert kind_of(bytes(data)) == "unsupported"


@pytest.mark.parametrize("size", [(48, 32), (96, 65), (1000, 1000)])
def test_headers_that_differ_are_corrupt(size):
    data = bytearray(jp2())
    struct.pack_into(">II", data, data.index(b"ihdr") + 4, *size)
    assert kind_of(bytes(data)) == "corrupt"


@pytest.mark.parametrize("bare", [False, True])
def test_cut_files_are_truncated(bare):
    data = jp2(no_jp2=bare)
    for length in {len(data) // 4, len(data) // 2, len(data) - 20, len(data) - 1}:
        assert kind_of(data[:length]) == "truncated", length


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**32 - 1])
@pytest.mark.parametrize("name", [b"jp2h", b"ihdr", b"colr", b"jp2c"])
def test_boxes_that_lead_nowhere_have_an_end(name, length):
    data = bytearray(jp2())
    struct.pack_into(">I", data, data.index(name) - 4, length)
    try:
        pixels = pixels_of(bytes(data))
    except InputError as error:
        pixels, kind = None, error.kind
    assert kind in {"corrupt", "truncated"} if pixels is None else np.array_equal(pixels, picture())
