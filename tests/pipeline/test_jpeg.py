import base64
import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.sources.images import decode_image
from tests.media import picture
from tests.pipeline.image_parts import LIMITS, kind_of, pixels_of

END = b"\xff\xd9"
# jpegtran -arithmetic of a ramp of 16x16 pixels.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdB"
    "RkxOUlNSMj5aYVpQYEpRUk//yQALCAAQABABAREA/8wABgAQEAX/2gAIAQEAAD8A/wB22zZnjOJHxjd/jfJ6CvL/2Q=="
)


def jpeg(pixels=None, mode="RGB", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(picture() if pixels is None else pixels).convert(mode)
    image.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def cut(data, part=0.5):
    """The file up to a place in its first scan, with an end glued on."""
    scan = data.index(b"\xff\xda")
    return data[: scan + int((len(data) - scan) * part)].rstrip(b"\xff") + END


def odd_scan(data):
    """As some cameras write it: the parameters of a sequential scan are all zero."""
    scan = data.index(b"\xff\xda")
    end = scan + 2 + struct.unpack_from(">H", data, scan + 2)[0]
    return data[: end - 3] + bytes(3) + data[end:]


def odd_version(data):
    place = data.index(b"JFIF\0") + 5
    return data[:place] + b"\x03" + data[place + 1 :]


def odd_transform(data):
    """Adobe's marker in JFIF's place, with a transform that nobody knows."""
    adobe = b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 9)
    end = 4 + struct.unpack_from(">H", data, 4)[0]
    return data[:2] + b"\xff\xee" + struct.pack(">H", len(adobe) + 2) + adobe + data[end:]


ODDITIES = [odd_scan, odd_version, odd_transform, lambda data: odd_scan(odd_version(data))]


@pytest.mark.parametrize("odd", ODDITIES)
def test_an_oddity_is_harmless_and_hides_no_damage(odd):
    data = odd(jpeg())
    assert np.array_equal(pixels_of(data), pixels_of(jpeg()))
    assert kind_of(cut(data)) == "corrupt"
    middle = len(data) * 2 // 3
    assert kind_of(data[:middle] + bytes(600) + data[middle + 600 :]) == "corrupt"


def test_an_oddity_hides_no_damage_at_a_fraction_of_the_size():
    data = odd_scan(jpeg(picture(640, 480)))
    assert decode_image(data, LIMITS, (64, 48))[0].shape == (60, 80, 3)
    with pytest.raises(InputError) as caught:
        decode_image(cut(data), LIMITS, (64, 48))
    assert caught.value.kind == "corrupt"


def scans_of(data):
    """Where each scan's tables begin, or the scan if it has none of its own."""
    position = 0
    while (position := data.find(b"\xff\xda", position + 1)) >= 0:
        tables = data.rfind(b"\xff\xc4", 0, position)
        yield tables if b"\xff\xda" not in data[tables:position] else position


def test_a_progressive_jpeg_without_all_its_scans_is_truncated():
    data = jpeg(progressive=True)
    starts = list(scans_of(data))
    assert len(starts) == 10
    for start in starts:
        assert kind_of(data[:start] + END) == "truncated"
    print(f"PROOF progressive JPEG without its last scans: truncated at {len(starts)} of them")


def test_a_progressive_jpeg_without_a_scan_in_the_middle_is_corrupt():
    data = jpeg(progressive=True)
    starts = list(scans_of(data))
    without = data[: starts[5]] + data[starts[6] :]
    assert kind_of(without) == "corrupt"
    assert kind_of(without[:-200] + END) == "corrupt"


def one_scan_per_channel(num_scans):
    """A JPEG of three equal channels, each in a scan of its own."""
    grey = jpeg(mode="L")
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    channels = b"".join(bytes([name, 0x11, 0]) for name in (1, 2, 3))
    header = struct.pack(">HHBHHB", 0xFFC0, 17, 8, 64, 96, 3) + channels
    tables = grey[frame + 13 : scan]
    coded = grey[scan + 10 : -2]
    scans = b"".join(
        struct.pack(">HHB", 0xFFDA, 8, 1) + bytes([name, 0, 0, 63, 0]) + coded
        for name in (1, 2, 3)[:num_scans]
    )
    return grey[:frame] + header + tables + scans + END


def test_a_jpeg_without_the_scans_of_its_colours_is_truncated():
    assert pixels_of(one_scan_per_channel(3)).shape == (64, 96, 3)
    for num_scans in (0, 1, 2):
        assert kind_of(one_scan_per_channel(num_scans)) == "truncated"


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_whole_jpegs_of_all_kinds_pass(mode):
    sampling = ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
    for subsampling, progressive, restarts in itertools.product(sampling, (False, True), (0, 2)):
        data = jpeg(
            mode=mode,
            subsampling=subsampling,
            progressive=progressive,
            restart_marker_blocks=restarts,
        )
        assert pixels_of(data).shape == (64, 96, 3)


def test_arithmetic_coding_passes():
    ramp = np.arange(256).reshape(16, 16, 1)
    assert np.abs(pixels_of(ARITHMETIC).astype(int) - ramp).mean() < 4
    assert kind_of(ARITHMETIC[:-2]) == "truncated"


def patched(data, marker, offset, value):
    place = data.index(marker) + offset
    return data[:place] + value + data[place + len(value) :]


@pytest.mark.parametrize(
    ("offset", "value"),
    [(4, b"\x0c"), (5, b"\0\0"), (1, b"\xf7"), (1, b"\xc5"), (1, b"\xcb")],
    ids=["12 bits", "height behind the pixels", "JPEG-LS", "hierarchical", "lossless arithmetic"],
)
def test_kinds_of_jpeg_that_nothing_here_reads_are_unsupported(offset, value):
    assert kind_of(patched(jpeg(), b"\xff\xc0", offset, value)) == "unsupported"


def test_nonsense_in_segments_is_corrupt_or_truncated():
    data = jpeg()
    assert kind_of(patched(data, b"\xff\xc0", 9, b"\x09")) == "corrupt"
    assert kind_of(patched(data, b"\xff\xda", 4, b"\xff")) in ("corrupt", "truncated")
    assert kind_of(patched(data, b"\xff\xda", 2, b"\xff\xff")) == "truncated"
    assert kind_of(data[:2] + b"\xff\xda\0\2" + data[2:]) == "corrupt"
