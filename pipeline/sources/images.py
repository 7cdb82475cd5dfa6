"""Still images: header, then pixels. Runs in the decoding child only.

Headers are read by Pillow, pixels by ``cv2.imdecode``, never ``imread``, but for the formats that
OpenCV gets wrong without a word (``pillow``, ``pnm``, ``bmp``). The rule that is recorded: the
first frame of an animation or a multi-page file, but the still picture of an animated PNG (often
its first frame); 8 bits per channel (the high byte of 16); grey copied to three channels; CMYK
converted; alpha dropped, not composited; the EXIF orientation that stands before the pixels is
applied. A JPEG at least twice as large as wanted is decoded at a half, a quarter or an eighth of
its size, which libjpeg does at a fraction of the time.
"""

import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from PIL import ExifTags, Image

from pipeline.errors import InputError
from pipeline.geometry import Orientation, UInt8Array
from pipeline.sources import bmp, jp2, jpeg, pillow, png, pnm, signatures, tiff
from pipeline.sources.assets import DecodeLimits, check_pixels
from pipeline.sources.capture import Capture, capture_of_image

HEAD_BYTES = 64 * 1024

_PILLOW_FORMATS = sorted(
    {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "SUN", "TIFF", "WEBP"}
    & set(Image.OPEN)
)
_EXIF_FORMATS = frozenset({"AVIF", "JPEG", "MPO", "PNG", "WEBP"})
_ORIENTATION_TAG = 0x0112
_SCALABLE_FORMATS = frozenset({"JPEG", "MPO"})
_REDUCED_FLAGS = {
    8: cv2.IMREAD_REDUCED_COLOR_8,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    2: cv2.IMREAD_REDUCED_COLOR_2,
}
_STDERR = 2


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What stands in front of the pixels.

    Attributes:
        format: Pillow's name of the format, or PNM or HDR.
        width: Width in pixels after orientation.
        height: Height, likewise.
        orientation: What is still to be done once the pixels are decoded.
        capture: When and where, as far as EXIF says.
    """

    format: str
    width: int
    height: int
    orientation: Orientation
    capture: Capture


def read_header(data: bytes) -> ImageHeader | None:
    """The header, from a file or its first bytes; None if there is none that can be read."""
    if pnm.is_pnm(data):
        sizes = pnm.read_header(data)
        return None if sizes is None else _plain_header("PNM", sizes.width, sizes.height)
    if data.startswith(_HDR_STARTS):
        found = _HDR_SIZE.search(data, 0, HEAD_BYTES)
        return None if found is None else _plain_header("HDR", int(found[2]), int(found[1]))
    try:
        with pillow.opened(data, _PILLOW_FORMATS) as image:
            name = image.format or ""
            orientation, capture = Orientation(), Capture()
            if name in _EXIF_FORMATS:
                orientation, capture = _read_exif(image.info.get("exif"))
            width, height = orientation.size(*image.size)
            if name == "TIFF":
                orientation, (width, height) = pillow.tiff_orientation(image), image.size
    except pillow.PARSE_ERRORS:
        return None
    return ImageHeader(
        format=name, width=width, height=height, orientation=orientation, capture=capture
    )


def _plain_header(format: str, width: int, height: int) -> ImageHeader:
    return ImageHeader(
        format=format, width=width, height=height, orientation=Orientation(), capture=Capture()
    )


def decode_image(
    data: bytes, limits: DecodeLimits, wanted: tuple[int, int] | None = None
) -> tuple[UInt8Array, tuple[int, int]]:
    """The upright RGB pixels of an image file, and its own width and height.

    Args:
        data: The file.
        limits: Bounds of its size.
        wanted: Width and height that the pixels are to be resized to: what comes out is then no
            smaller, but may be smaller than the file's own size. None asks for that.

    Raises:
        InputError: ``too_large``, ``truncated``, ``corrupt``, ``unsupported`` or
            ``out_of_memory``.
    """
    if not data:
        raise InputError("truncated", "the file is empty")
    header = read_header(data)
    factor = 1
    if header is not None:
        check_pixels(header.width, header.height, limits)
        if wanted is not None and header.format in _SCALABLE_FORMATS:
            factor = _reduction((header.width, header.height), wanted)
    try:
        pixels = _decode(data, header, limits, factor)
    except MemoryError as error:
        raise InputError("out_of_memory", "no memory to decode the image") from error
    if pixels is None:
        raise _undecodable(data, header)
    check_pixels(pixels.shape[1], pixels.shape[0], limits)
    upright = header.orientation.apply(pixels) if header is not None else pixels
    if header is not None and factor > 1:
        return upright, (header.width, header.height)
    return upright, (upright.shape[1], upright.shape[0])


def _reduction(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    """The largest factor that leaves both sides at least as large as wanted."""
    for factor in _REDUCED_FLAGS:
        if size[0] >= factor * wanted[0] and size[1] >= factor * wanted[1]:
            return factor
    return 1


def _read_exif(block: object) -> tuple[Orientation, Capture]:
    if not isinstance(block, bytes):
        return Orientation(), Capture()
    exif = Image.Exif()
    try:
        with pillow.no_warnings():
            exif.load(block)
            orientation = Orientation.from_exif(exif.get(_ORIENTATION_TAG))
    except pillow.PARSE_ERRORS:
        return Orientation(), Capture()
    try:
        with pillow.no_warnings():
            details, gps = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
            return orientation, capture_of_image(details, gps)
    except pillow.PARSE_ERRORS:
        return orientation, Capture()


def _decode(
    data: bytes, header: ImageHeader | None, limits: DecodeLimits, factor: int
) -> UInt8Array | None:
    if data.startswith(jpeg.START):
        return _decode_jpeg(data, factor)
    if pnm.is_pnm(data):
        return pnm.decode(data)
    if bmp.has_masks(data):
        return bmp.decode(data, limits)
    if header is not None and header.format in _BY_PILLOW:
        return _decode_by_pillow(data, header)
    if data.startswith(_ONLY_BY_PILLOW):
        return None
    pixels = _imdecode(png.still(data))[0]
    if pixels is not None and header is not None and header.format == "GIF":
        # OpenCV sees damage that Pillow does not, but lays what is transparent over a background.
        pixels = _decode_by_pillow(data, header)
    return pixels


def _decode_jpeg(data: bytes, factor: int) -> UInt8Array | None:
    structure = jpeg.read_structure(data)
    if structure.unsupported is not None:
        raise InputError("unsupported", structure.unsupported)
    if not structure.is_whole:
        raise InputError("truncated", "the JPEG ends before its pixels do")
    pixels, said = _imdecode(structure.mend(data), _REDUCED_FLAGS.get(factor, cv2.IMREAD_COLOR))
    if pixels is not None:
        jpeg.check_said(said)
    elif structure.may_be_unsupported:
        raise InputError("unsupported", "a JPEG of this rare kind is not supported")
    return pixels


def _decode_by_pillow(data: bytes, header: ImageHeader) -> UInt8Array | None:
    format = header.format
    if format == "JPEG2000":
        jp2.check(data, (header.width, header.height))
    if format == "TIFF" and _is_silently_damaged(data):
        return None
    with _captured_stderr() as said:
        pixels = pillow.decode(data, format)
        printed = said()
    if pixels is None and b"support is not configured" in printed:
        raise InputError("unsupported", f"the {format}'s compression is not supported")
    return pixels


def _is_silently_damaged(data: bytes) -> bool:
    """Whether a TIFF is damaged where libtiff keeps what its decoders find to itself."""
    smallest = max(_REDUCED_FLAGS)
    if any(_decode_jpeg(piece, smallest) is None for piece in tiff.jpegs(data)):
        return True
    return not tiff.fits_checksums(data)


def _imdecode(data: bytes, flags: int = cv2.IMREAD_COLOR) -> tuple[UInt8Array | None, bytes]:
    """Pixels, and what the decoder printed."""
    flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        with _captured_stderr() as said:
            pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            printed = said()
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
        return None, b""
    if pixels is None:
        return None, printed
    return cast("UInt8Array", cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)), printed


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], bytes]]:
    """Catch what C libraries print, and give a way to read it."""
    saved = os.dup(_STDERR)
    caught = os.memfd_create("stderr")
    os.dup2(caught, _STDERR)
    try:
        yield lambda: os.pread(_STDERR, 4096, 0)
    finally:
        os.dup2(saved, _STDERR)
        os.close(saved)
        os.close(caught)


def _undecodable(data: bytes, header: ImageHeader | None) -> InputError:
    if header is None:
        foreign = _foreign_format(data)
        if foreign is not None:
            return InputError("unsupported", f"{foreign} is not supported")
    if _ends_early(data):
        return InputError("truncated", "the image file ends early")
    if header is None and data.startswith(tiff.STARTS):
        return InputError("unsupported", "a TIFF of this kind is not supported")
    if header is None:
        return InputError("corrupt", "not an image in a known format")
    if header.format == "GIF" and (header.width, header.height) != _gif_canvas(data):
        return InputError("unsupported", "a GIF that reaches beyond its canvas is not supported")
    return InputError("corrupt", f"the {header.format} image cannot be decoded")


def _foreign_format(data: bytes) -> str | None:
    """What a file is that nothing here can read."""
    if data[4:8] == b"ftyp" and not any(brand in data[:HEAD_BYTES] for brand in _AVIF_BRANDS):
        return "HEIC or another relative of MP4"
    if data.startswith(_HDR_STARTS) and _HDR_TURNED.search(data, 0, HEAD_BYTES):
        return "an HDR image of turned rows"
    return signatures.no_image(data)


def _ends_early(data: bytes) -> bool:
    """Whether the file's own structure says that there should be more of it."""
    if data[4:8] in _BOX_NAMES:
        return not _boxes_end(data)
    for start, is_whole in _STRUCTURES:
        if data.startswith(start):
            return not is_whole(data)
    return False


def _boxes_end(data: bytes) -> bool:
    position = 0
    while position + 8 <= len(data):
        length, _ = struct.unpack_from(">I4s", data, position)
        if length == 1 and position + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, position + 8)
        if length == 0:
            return True
        position += max(8, length)
    return position == len(data)


def _riff_ends(data: bytes) -> bool:
    return len(data) >= 8 and 8 + int.from_bytes(data[4:8], "little") <= len(data)


def _bmp_ends(data: bytes) -> bool:
    return len(data) >= 6 and int.from_bytes(data[2:6], "little") <= len(data)


def _gif_canvas(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _gif_ends(data: bytes) -> bool:
    return data.rstrip(b"\0").endswith(b";")


_BY_PILLOW = frozenset({"JPEG2000", "SUN", "TIFF"})
_ONLY_BY_PILLOW = (*jp2.STARTS, *tiff.STARTS)
_HDR_STARTS = (b"#?RADIANCE", b"#?RGBE")
_HDR_SIZE = re.compile(rb"\n\n-Y (\d{1,9}) \+X (\d{1,9})\n")
_HDR_TURNED = re.compile(rb"\n\n[-+][XY] \d+ [-+][XY] \d+\n")
_AVIF_BRANDS = (b"avif", b"avis")
_BOX_NAMES = (b"ftyp", b"jP  ")
_STRUCTURES: tuple[tuple[bytes, Callable[[bytes], bool]], ...] = (
    (png.START, png.is_whole),
    (b"RIFF", _riff_ends),
    (b"BM", _bmp_ends),
    (b"GIF8", _gif_ends),
    (jp2.STARTS[1], jp2.is_whole),
    *((start, tiff.is_whole) for start in tiff.STARTS),
)
