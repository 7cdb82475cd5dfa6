import gzip
import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.geometry import Orientation
from pipeline.sources.assets import DecodeLimits
from pipeline.sources.images import HEAD_BYTES, decode_image, read_header
from pipeline.sources.listing import IMAGE_EXTENSIONS
from tests.media import encode_cv2, encode_image, picture
from tests.pipeline.image_parts import LIMITS, distance, kind_of, pixels_of


@pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS))
def test_every_listed_extension_decodes(extension):
    pixels = picture()
    decoded = pixels_of(encode_cv2(pixels, f".{extension}"), LIMITS)
    assert decoded.shape == pixels.shape
    assert decoded.dtype == np.uint8
    # OpenCV writes PAM's red and blue the wrong way round.
    if extension not in ("pbm", "pgm", "pnm", "pam"):
        assert distance(decoded, pixels) < 20


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_png_modes(mode):
    data = encode_image(picture(), "PNG", mode=mode)
    assert np.array_equal(pixels_of(data, LIMITS), reference(data))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_jpeg_modes(mode):
    data = encode_image(picture(), "JPEG", mode=mode)
    assert distance(pixels_of(data, LIMITS), reference(data)) < 3


def reference(data):
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in ("RGBA", "LA"):  # alpha is dropped, not composited
            bands = image.split()[:-1]
            return np.asarray(Image.merge("RGB", bands if len(bands) == 3 else bands * 3))
        return np.asarray(image.convert("RGB"))


def test_16_bits_keep_the_high_byte():
    deep = picture().astype(np.uint16) * 256 + 77
    _, data = cv2.imencode(".png", deep[..., ::-1])
    assert np.array_equal(pixels_of(data.tobytes(), LIMITS), picture())


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("GIF", {"transparency": 5}),
    ],
)
def test_animations_give_their_first_frame(format, options):
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    if format == "GIF":
        frames = [frame.quantize(64) for frame in frames]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], duration=50, **options)
    data = buffer.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert np.array_equal(pixels_of(data, LIMITS), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_colours_of_a_palette_keep_their_own(format):
    image = Image.fromarray(picture()).quantize(64)
    assert (np.asarray(image) == 5).any()
    buffer = io.BytesIO()
    image.save(buffer, format, transparency=5)
    assert np.array_equal(pixels_of(buffer.getvalue()), np.asarray(image.convert("RGB")))


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def animated_png(num_frames=2, *, control=True, pixels=None):
    """A picture with a second frame around it; ``pixels`` are its deflated rows."""
    rows = np.insert(picture().reshape(64, -1), 0, 0, axis=1)
    pixels = zlib.compress(rows.tobytes()) if pixels is None else pixels
    control_of = [
        png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 96, 64, 0, 0, 1, 10, 0, 0)) * control
        for number in (0, 1)
    ]
    chunks = [
        png_chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 64, 8, 2, 0, 0, 0)),
        png_chunk(b"acTL", struct.pack(">II", num_frames, 0)),
        control_of[0] + png_chunk(b"IDAT", pixels),
        control_of[1] + png_chunk(b"fdAT", struct.pack(">I", 2) + zlib.compress(bytes(rows.size))),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("num_frames", [0, 1, 2, 2**31])
@pytest.mark.parametrize("control", [True, False])
def test_an_animated_png_gives_its_still_picture(num_frames, control):
    data = animated_png(num_frames, control=control)
    assert np.array_equal(pixels_of(data), picture())


def test_a_still_picture_beside_the_animation_is_the_one():
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "PNG", save_all=True, append_images=frames[1:], duration=50, default_image=True
    )
    assert np.array_equal(pixels_of(buffer.getvalue()), picture(seed=0))


def test_damage_to_an_animated_png_is_seen():
    data = animated_png()
    start, end = data.index(b"IDAT"), data.index(b"fdAT") - 4
    for place in range(start, end, 499):
        changed = bytearray(data)
        changed[place] ^= 4
        assert kind_of(bytes(changed)) == "corrupt", place
    deflated = data[start + 4 : end]
    assert kind_of(animated_png(pixels=deflated[:4000] + deflated[6000:])) == "corrupt"
    for length in {start, (start + end) // 2, end + 20, len(data) - 20, len(data) - 1}:
        assert kind_of(data[:length]) == "truncated", length


@pytest.mark.parametrize("length", [0, 1, 2**31 - 1, 2**32 - 1])
def test_a_length_that_leads_nowhere_ends_a_png(length):
    data = bytearray(animated_png())
    struct.pack_into(">I", data, data.index(b"acTL") - 4, length)
    assert kind_of(bytes(data)) in {"corrupt", "truncated"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(format, orientation):
    pixels = picture()
    upright = Orientation.from_exif(orientation).apply(pixels)
    data = encode_image(pixels, format, orientation=orientation)
    header = read_header(data)
    assert (header.height, header.width) == upright.shape[:2]
    decoded = pixels_of(data, LIMITS)
    assert decoded.shape == upright.shape
    assert distance(decoded, upright) < 12


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_is_truncated_wherever_it_is_cut(progressive):
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG", progressive=progressive)
    data = buffer.getvalue()
    lengths = {0, 1, *range(2, len(data), 37), len(data) - 2, len(data) - 1}
    for length in lengths:
        expected = "corrupt" if length == 1 else "truncated"
        assert kind_of(data[:length]) == expected, length
    name = "progressive" if progressive else "sequential"
    print(f"PROOF {name} JPEG cut at {len(lengths)} places: typed at each")


@pytest.mark.parametrize("extension", [".png", ".bmp", ".webp", ".tiff", ".gif", ".jp2", ".avif"])
def test_cut_files_of_other_formats_are_truncated(extension):
    data = encode_cv2(picture(), extension)
    for length in {len(data) // 4, len(data) // 2, len(data) - 20, len(data) - 1}:
        assert kind_of(data[:length]) == "truncated", length


def test_lost_jpeg_data_is_never_filled_with_grey():
    data = encode_image(picture(), "JPEG")
    half = len(data) // 2
    assert kind_of(data[:half] + b"\xff\xd9") == "corrupt"
    assert kind_of(data[:half] + bytes(len(data) - half)) == "truncated"
    assert kind_of(data[:half] + bytes(len(data) - half - 2) + b"\xff\xd9") == "corrupt"


def test_a_thumbnail_does_not_hide_the_missing_end():
    thumbnail = encode_image(picture(32, 32), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    data = encode_image(picture(), "JPEG")
    whole = data[:2] + segment + data[2:]
    assert pixels_of(whole, LIMITS).shape == (64, 96, 3)
    assert kind_of(whole[: len(whole) * 3 // 4]) == "truncated"
    assert kind_of(whole[: len(segment) // 2]) == "truncated"


def test_padding_behind_a_jpeg_is_harmless():
    data = encode_image(picture(), "JPEG")
    assert np.array_equal(pixels_of(data + bytes(512), LIMITS), pixels_of(data, LIMITS))


def test_damaged_png_is_corrupt():
    data = bytearray(encode_image(picture(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert kind_of(bytes(data)) == "corrupt"


@pytest.mark.parametrize(
    "data", [b"x" * 100, bytes(5000), b"<html>404</html>", b"\xff\xd8\xff\xd9"]
)
def test_what_is_no_image_is_corrupt(data):
    assert kind_of(data) == "corrupt"


def huge_png(side):
    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    rows = zlib.compress(bytes((side + 7) // 8 + 1) * 64)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_header_without_a_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert kind_of(huge_png(30_000)) == "too_large"
    assert not caught
    assert (
        kind_of(encode_image(picture(), "PNG"), DecodeLimits(max_pixels=96 * 64 - 1)) == "too_large"
    )


def test_headers_need_only_the_first_bytes():
    large = picture(2000, 1500)
    for format in ("JPEG", "PNG", "BMP"):
        data = encode_image(large, format)
        assert len(data) > HEAD_BYTES
        header = read_header(data[:HEAD_BYTES])
        assert (header.width, header.height) == (2000, 1500)


def test_stderr_comes_back_after_decoding(capfd):
    import os

    pixels_of(encode_image(picture(), "JPEG"), LIMITS)
    kind_of(encode_image(picture(), "PNG")[:300])
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        (None, (200, 120)),
        ((101, 60), (200, 120)),
        ((100, 60), (100, 60)),
        ((64, 32), (100, 60)),
        ((50, 30), (50, 30)),
        ((20, 10), (25, 15)),
    ],
)
def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(wanted, size):
    data = encode_cv2(picture(200, 120), ".jpg")
    pixels, own_size = decode_image(data, LIMITS, wanted)
    assert (pixels.shape[1], pixels.shape[0]) == size
    assert own_size == (200, 120)
    whole = cv2.resize(pixels_of(data), size, interpolation=cv2.INTER_AREA)
    assert distance(pixels, whole) < 4


def test_other_formats_are_decoded_whole():
    data = encode_cv2(picture(200, 120), ".png")
    pixels, own_size = decode_image(data, LIMITS, (50, 30))
    assert own_size == (pixels.shape[1], pixels.shape[0]) == (200, 120)


def test_a_turned_jpeg_is_reduced_by_its_upright_size():
    data = encode_image(picture(200, 120), "JPEG", orientation=6)
    pixels, own_size = decode_image(data, LIMITS, (60, 100))
    assert own_size == (120, 200)
    assert pixels.shape[:2] == (100, 60)
    assert decode_image(data, LIMITS, (61, 100))[0].shape[:2] == (200, 120)


def test_damage_is_seen_at_a_fraction_of_the_size_too():
    data = encode_cv2(picture(640, 480), ".jpg")
    with pytest.raises(InputError):
        decode_image(data[: len(data) // 2], LIMITS, (64, 48))


def bmp_of(values, masks, num_bits, header_bytes=40, height=64):
    rest = bytes(header_bytes - 40 - (12 if header_bytes > 40 else 0))
    offset = 14 + 40 + 12 + len(rest)
    data = values.tobytes()
    info = struct.pack("<IiiHHII16x", header_bytes, 96, height, 1, num_bits, 3, len(data))
    start = b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
    return start + info + struct.pack("<3I", *masks) + rest + data


def packed(pixels, shifts, dtype):
    return sum(pixels[..., i].astype(dtype) << dtype(shift) for i, shift in enumerate(shifts))


@pytest.mark.parametrize("header_bytes", [40, 108, 124])
@pytest.mark.parametrize("shifts", [(0, 8, 16), (16, 8, 0), (24, 16, 8), (8, 0, 24)])
def test_a_bmp_says_which_bits_are_which_channel(shifts, header_bytes):
    masks = [0xFF << shift for shift in shifts]
    values = packed(picture(), shifts, np.uint32)
    assert np.array_equal(pixels_of(bmp_of(values[::-1], masks, 32, header_bytes)), picture())
    top_down = bmp_of(values, masks, 32, header_bytes, height=-64)
    assert np.array_equal(pixels_of(top_down), picture())
    assert kind_of(top_down[:-1]) == "truncated"
    assert kind_of(top_down, DecodeLimits(max_pixels=6143)) == "too_large"


@pytest.mark.parametrize(
    ("masks", "shifts", "lost"),
    [
        ((0xF800, 0x7E0, 0x1F), (11, 5, 0), (3, 2, 3)),
        ((0x1F, 0x3E0, 0x7C00), (0, 5, 10), (3, 3, 3)),
    ],
)
def test_fewer_bits_of_a_bmp_are_spread_over_8(masks, shifts, lost):
    values = packed(picture() >> np.array(lost, np.uint8), shifts, np.uint16)
    decoded = pixels_of(bmp_of(values[::-1], masks, 16))
    assert np.abs(decoded.astype(int) - picture()).max() <= 8
    black_white = bmp_of(np.tile(np.uint16([0, 0xFFFF]), (64, 48)), masks, 16)
    assert pixels_of(black_white)[0, :2].tolist() == [[0] * 3, [255] * 3]


def test_masks_of_nothing_mean_the_usual_ones():
    values = packed(picture(), (16, 8, 0), np.uint32)
    assert np.array_equal(pixels_of(bmp_of(values[::-1], (0, 0, 0), 32)), picture())


def test_masks_of_ten_bits_keep_the_high_ones():
    deep = picture().astype(np.uint32) << 2 | 3
    masks = [0x3FF << shift for shift in (20, 10, 0)]
    values = packed(deep, (20, 10, 0), np.uint32)
    assert np.array_equal(pixels_of(bmp_of(values[::-1], masks, 32)), picture())


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\x0a" + bytes(100),
        b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300),
        b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0\0\xff\0meta",
        b"8BPS\0\1" + bytes(300),
        b"%PDF-1.4\n",
        b"v/1\x01" + bytes(100),
        *(
            encode_image(picture(), format)
            for format in ("ICO", "ICNS", "PCX", "TGA", "SGI", "QOI")
        ),
        b"\x1a\x45\xdf\xa3" + bytes(100),
        b"RIFF\0\0\0\0AVI " + bytes(100),
        (b"\x47" + bytes(187)) * 3,
        gzip.compress(bytes(100)),
        b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n+Y 64 +X 96\n" + bytes(4 * 96 * 64),
    ],
    ids=[
        "jxl",
        "jxl box",
        "heic",
        "mif1",
        "psd",
        "pdf",
        "exr",
        "ico",
        "icns",
        "pcx",
        "tga",
        "sgi",
        "qoi",
        "matroska",
        "avi",
        "ts",
        "gzip",
        "turned hdr",
    ],
)
def test_what_is_known_but_not_read_is_unsupported(data):
    assert kind_of(data) == "unsupported"


def test_a_gif_that_reaches_beyond_its_canvas_is_unsupported():
    data = bytearray(encode_image(picture(), "GIF"))
    struct.pack_into("<HH", data, 6, 50, 40)
    assert kind_of(bytes(data)) == "unsupported"


def test_a_radiance_bomb_is_refused_by_its_header():
    data = b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 60000 +X 50000\n" + bytes(100)
    assert kind_of(data) == "too_large"
    header = read_header(encode_cv2(picture(), ".hdr"))
    assert (header.width, header.height) == (96, 64)
