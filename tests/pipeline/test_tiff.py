import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.geometry import Orientation
from pipeline.sources.assets import DecodeLimits
from pipeline.sources.images import read_header
from tests.media import encode_cv2, encode_image, picture
from tests.pipeline.image_parts import distance, kind_of, pixels_of

BYTE, SHORT, LONG = 1, 3, 4
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 259, 262, 274
STRIPS, SAMPLES, ROWS, STRIP_BYTES, PLANAR = 273, 277, 278, 279, 284
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES, EXTRA, FORMAT, XMP = 322, 323, 324, 325, 338, 339, 700
KINDS = {XMP: BYTE, **dict.fromkeys((STRIPS, STRIP_BYTES, TILES, TILE_BYTES), LONG)}
CODES = {BYTE: "B", SHORT: "H", LONG: "I"}
RGB, WHITE_IS_ZERO, GREY = 2, 0, 1


def tiff(pieces, shape, tags, *, tile=None, order="<"):
    """A TIFF of bytes as they are: one strip, or tiles of that side, and tags of ours on top."""
    height, width, depth = shape
    places = list(np.cumsum([8, *map(len, pieces)])[:-1])
    places_tag, bytes_tag = (TILES, TILE_BYTES) if tile else (STRIPS, STRIP_BYTES)
    shapes = {TILE_WIDTH: [tile], TILE_HEIGHT: [tile]} if tile else {ROWS: [height]}
    fields = {
        WIDTH: [width],
        HEIGHT: [height],
        BITS: [8] * depth,
        COMPRESSION: [1],
        PHOTOMETRIC: [RGB if depth > 2 else GREY],
        SAMPLES: [depth],
        places_tag: places,
        bytes_tag: [len(piece) for piece in pieces],
        **shapes,
        **tags,
    }
    directory = 8 + sum(map(len, pieces))
    beyond = directory + 2 + 12 * len(fields) + 4
    entries, values = b"", b""
    for tag, numbers in sorted(fields.items()):
        kind = KINDS.get(tag, SHORT)
        packed = struct.pack(f"{order}{len(numbers)}{CODES[kind]}", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack(f"{order}I", beyond + len(values)), values + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, directory)
    count = struct.pack(f"{order}H", len(fields))
    return start + b"".join(pieces) + count + entries + bytes(4) + values


def of_pixels(pixels, tags=(), order="<", **options):
    shape = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = {BITS: [8 * pixels.dtype.itemsize] * shape[2]}
    return tiff([data], shape, {**bits, **dict(tags)}, order=order, **options)


def in_tiles(pixels, tags, side=32):
    pieces = [
        pixels[y : y + side, x : x + side].tobytes()
        for y in range(0, pixels.shape[0], side)
        for x in range(0, pixels.shape[1], side)
    ]
    return tiff(pieces, pixels.shape, tags, tile=side)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("tiled", [False, True])
def test_any_layout_is_put_upright(orientation, tiled):
    make = in_tiles if tiled else of_pixels
    data = make(picture(), {ORIENTATION: [orientation]})
    expected = Orientation.from_exif(orientation)
    header = read_header(data)
    assert header.orientation == expected
    upright = expected.apply(picture())
    assert (header.height, header.width) == upright.shape[:2]
    assert np.array_equal(pixels_of(data), upright)


def test_an_orientation_in_xmp_is_none():
    data = of_pixels(picture(), {XMP: b'<rdf tiff:Orientation="6"/>'})
    assert np.array_equal(pixels_of(data), picture())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_16_bits_keep_the_high_byte(order, depth):
    pixels = np.dstack([picture(), picture(seed=1)])[..., :depth]
    extra = {EXTRA: [2]} if depth == 4 else {}
    data = of_pixels(pixels.astype(np.uint16) * 256 + 200, extra, order)
    assert np.array_equal(pixels_of(data), np.broadcast_to(pixels[..., :3], (64, 96, 3)))


def test_planes_of_16_bits_are_no_riddle():
    planes = np.ascontiguousarray(picture().transpose(2, 0, 1)).astype("<u2") * 256 + 9
    tags = {BITS: [16] * 3, PLANAR: [2]}
    data = tiff([plane.tobytes() for plane in planes], (64, 96, 3), tags)
    assert np.array_equal(pixels_of(data), picture())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_may_be_zero(dtype):
    grey = picture()[..., 0]
    inverted = (255 - grey).astype(dtype) * (257 if dtype is np.uint16 else 1)
    data = of_pixels(inverted, {PHOTOMETRIC: [WHITE_IS_ZERO]})
    assert np.array_equal(pixels_of(data), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", [0, 2])
def test_alpha_is_dropped_not_multiplied(kind):
    pixels = np.dstack([picture(), np.full((64, 96, 1), 40, np.uint8)])
    assert np.array_equal(pixels_of(of_pixels(pixels, {EXTRA: [kind]})), picture())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes(mode):
    image = Image.fromarray(picture()).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", compression="tiff_lzw")
    expected = image.convert("RGB") if mode != "LA" else image.convert("L").convert("RGB")
    assert np.array_equal(pixels_of(buffer.getvalue()), np.asarray(expected))


def test_the_first_of_several_pages_counts():
    pages = [Image.fromarray(picture(seed=seed)) for seed in range(2)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(pixels_of(buffer.getvalue()), picture())


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_damage_is_seen_in_compressed_strips(compression, capfd):
    buffer = io.BytesIO()
    smooth = np.repeat(picture(), 4, axis=1)
    Image.fromarray(smooth).save(buffer, "TIFF", compression=compression)
    data = buffer.getvalue()
    assert distance(pixels_of(data), smooth) < 8
    middle = len(data) // 2
    assert kind_of(data[:middle] + bytes(600) + data[middle + 600 :]) == "corrupt"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("length", [10, 200, 8000, -1])
def test_what_ends_early_is_truncated(length):
    for data in (of_pixels(picture()), encode_cv2(picture(), ".tif")):
        assert kind_of(data[:length]) == "truncated"


@pytest.mark.parametrize(
    "data",
    [
        of_pixels(picture(), {COMPRESSION: [34712]}),
        of_pixels(picture(), {COMPRESSION: [34887]}),
        of_pixels(picture(), {COMPRESSION: [50001]}),
        of_pixels(picture()[..., 0].astype(np.float32), {FORMAT: [3]}),
        of_pixels(picture().astype(np.float32), {FORMAT: [3] * 3}),
        of_pixels(picture()[..., 0].astype(np.uint32)),
        of_pixels(picture()[..., 0].astype(np.int8), {FORMAT: [2]}),
        of_pixels(picture().astype(np.int16), {FORMAT: [2] * 3}),
        of_pixels(np.zeros((64, 96, 7), np.uint8), {PHOTOMETRIC: [GREY]}),
    ],
    ids=["JPEG 2000", "LERC", "WebP", "float", "floats", "32 bits", "int8", "int16", "7 bands"],
)
def test_what_pillow_does_not_know_is_unsupported(data):
    assert kind_of(data) == "unsupported"


def test_size_is_checked_by_the_header():
    data = tiff([b"\0" * 100], (60_000, 60_000, 3), {})
    assert kind_of(data) == "too_large"
    assert kind_of(of_pixels(picture()), DecodeLimits(max_pixels=96 * 64 - 1)) == "too_large"


def test_big_tiffs_are_read():
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "TIFF", big_tiff=True)
    data = buffer.getvalue()
    assert data[2] == 43
    assert np.array_equal(pixels_of(data), picture())
    assert kind_of(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("place", [8, 16])
def test_places_and_numbers_that_no_file_has_are_truncated(place):
    data = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) + bytes(400)
    assert kind_of(data[:place] + b"\xff" * 8 + data[place + 8 :]) == "truncated"


def test_sun_rasters_are_read_in_either_order_of_colours():
    data = encode_cv2(picture(), ".ras")
    assert np.array_equal(pixels_of(data), picture())
    # Type 3 is RGB instead of BGR.
    turned = data[:20] + struct.pack(">I", 3) + data[24:]
    assert np.array_equal(pixels_of(turned), picture()[..., ::-1])
    assert kind_of(data[:9000]) == "truncated"


def test_no_memory_is_told_from_damage(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    assert kind_of(encode_image(picture(), "TIFF")) == "out_of_memory"
