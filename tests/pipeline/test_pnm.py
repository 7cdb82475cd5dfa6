import numpy as np
import pytest

from pipeline.sources.images import read_header
from tests.media import picture
from tests.pipeline.image_parts import kind_of, pixels_of

RED = picture()[..., 0]
ALPHA = np.full((64, 96, 1), 10, np.uint8)


def as_grey(plane):
    return np.repeat(plane[..., None], 3, axis=2)


def text(samples):
    return " ".join(map(str, samples.ravel().tolist())).encode()


def pam(samples, max_value, tuple_type=b"", depth=None):
    height, width, own_depth = samples.shape
    kind = b"TUPLTYPE " + tuple_type + b"\n" if tuple_type else b""
    return (
        b"P7\n# a comment\nWIDTH %d\nHEIGHT %d\nDEPTH %d\n" % (width, height, depth or own_depth)
        + b"MAXVAL %d\n" % max_value
        + kind
        + b"ENDHDR\n"
        + samples.astype(">u2" if max_value > 255 else np.uint8).tobytes()
    )


@pytest.mark.parametrize("num_bits", [8, 10, 12, 16])
def test_the_high_bits_of_each_sample_count(num_bits):
    deep = picture().astype(np.uint16) << (num_bits - 8)
    deep += (1 << (num_bits - 8)) - 1
    raw = deep.astype(">u2" if num_bits > 8 else np.uint8)
    header = b" 96 64 %d\n" % ((1 << num_bits) - 1)
    assert np.array_equal(pixels_of(b"P6" + header + raw.tobytes()), picture())
    assert np.array_equal(pixels_of(b"P3" + header + text(deep)), picture())
    grey = raw[..., 0].tobytes()
    assert np.array_equal(pixels_of(b"P5" + header + grey), as_grey(RED))
    assert np.array_equal(pixels_of(pam(deep, (1 << num_bits) - 1)), picture())


@pytest.mark.parametrize("max_value", [1, 15, 100, 127, 254])
def test_fewer_values_are_spread_over_8_bits(max_value):
    levels = (RED.astype(int) * max_value // 255).astype(np.uint8)
    expected = as_grey(np.round(levels * (255 / max_value)).astype(np.uint8))
    header = b" 96 64 %d\n" % max_value
    assert np.abs(pixels_of(b"P5" + header + levels.tobytes()) - expected.astype(int)).max() <= 1
    assert np.abs(pixels_of(b"P2" + header + text(levels)) - expected.astype(int)).max() <= 1
    assert pixels_of(b"P5 2 1 %d\n" % max_value + bytes([0, max_value])).tolist() == [
        [[0] * 3, [255] * 3]
    ]


@pytest.mark.parametrize("max_value", [255, 65535])
@pytest.mark.parametrize(
    ("tuple_type", "depth"),
    [(b"GRAYSCALE", 1), (b"GRAYSCALE_ALPHA", 2), (b"RGB", 3), (b"RGB_ALPHA", 4), (b"", 4)],
)
def test_pam_keeps_its_colours_and_loses_its_alpha(max_value, tuple_type, depth):
    expected = picture() if depth > 2 else as_grey(RED)
    samples = np.dstack([expected[..., : (depth - 1) | 1], ALPHA])[..., :depth]
    scale = max_value // 255
    assert np.array_equal(
        pixels_of(pam(samples.astype(np.uint16) * scale, max_value, tuple_type)), expected
    )


def test_black_and_white():
    white = RED > 127
    expected = as_grey(white * np.uint8(255))
    rows = b"\n".join(b"".join(b"10"[bit : bit + 1] for bit in row) for row in white.astype(int))
    assert np.array_equal(
        pixels_of(pam(white[..., None].astype(np.uint8), 1, b"BLACKANDWHITE")), expected
    )
    packed = np.packbits(~white, axis=1).tobytes()
    assert np.array_equal(pixels_of(b"P4\n96 64\n" + packed), expected)
    assert np.array_equal(pixels_of(b"P4\n91 64\n" + packed), expected[:, :91])
    assert np.array_equal(pixels_of(b"P1\n96 64\n" + rows), expected)
    assert np.array_equal(pixels_of(b"P1\n96 64\n" + rows.replace(b"1", b"1 ")), expected)


def test_comments_and_line_ends_do_not_matter():
    plain = b"P3\n# made\r\n96 #wide\n64\n255\n"
    body = text(picture())
    for data in (body, body + b"\n", body.replace(b" ", b"\n"), b"# more\n" + body):
        assert np.array_equal(pixels_of(plain + data), picture())
    raw = picture().tobytes()
    assert np.array_equal(pixels_of(b"P6\n#\n96\n64 255\n" + raw + b"P6 1 1 255\n..."), picture())


@pytest.mark.parametrize(
    "data",
    [
        b"P6 96 64 255\n" + picture().tobytes()[:9000],
        b"P5 96 64 65535\n" + RED.tobytes(),
        b"P4 96 64\n" + bytes(700),
        b"P3 96 64 255\n" + text(picture())[:30_000],
        b"P2 96 64 255\n",
        b"P1 96 64\n0101",
        pam(picture(), 255)[:9000],
    ],
)
def test_what_ends_early_is_truncated(data):
    assert kind_of(data) == "truncated"
    header = read_header(data)
    assert (header.width, header.height) == (96, 64)


@pytest.mark.parametrize(
    "data",
    [
        b"P6 96 64 0\n" + picture().tobytes(),
        b"P6 96 64 65536\n" + picture().tobytes(),
        b"P6 0 64 255\n" + picture().tobytes(),
        b"P6 -96 64 255\n" + picture().tobytes(),
        b"P6 " + b"9" * 5000 + b" 64 255\n",
        b"P2 2 1 255\n12 x",
        b"P2 2 1 255\n12 256",
        b"P2 2 1 255\n-1 25",
        b"P1 2 1\n02",
        b"P7\nWIDTH x\nHEIGHT 1\nDEPTH 1\nMAXVAL 1\nENDHDR\n0",
        b"P7\nWIDTH 1\nENDHDR\n0",
        b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 1\n0",
        b"P7\nENDHDR",
    ],
)
def test_nonsense_is_corrupt(data):
    assert kind_of(data) == "corrupt"


@pytest.mark.parametrize(
    "data",
    [
        b"PF\n2 1\n-1.0\n" + bytes(24),
        b"Pf\n2 1\n-1.0\n" + bytes(8),
        pam(np.zeros((2, 2, 5), np.uint8), 255),
        pam(np.zeros((2, 2, 4), np.uint8), 255, b"CMYK"),
    ],
)
def test_what_is_not_grey_or_rgb_of_whole_numbers_is_unsupported(data):
    assert kind_of(data) == "unsupported"


@pytest.mark.parametrize(
    "data",
    [
        b"P7\nWIDTH 60000\nHEIGHT 60000\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n...",
        b"P6 60000 60000 255\n...",
        b"P3 60000 60000 255\n1 2 3",
    ],
)
def test_size_is_checked_by_the_header(data):
    assert kind_of(data) == "too_large"
