"""Pixels by Pillow, of what OpenCV gets wrong in silence: TIFF, Sun raster, JPEG 2000, GIF."""

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from pipeline.errors import InputError
from pipeline.geometry import Orientation, UInt8Array

# DecodeLimits takes the place of Pillow's own guard, whose warnings would leak.
Image.MAX_IMAGE_PIXELS = None
# Pillow's own reader of uncompressed TIFFs mixes up planes of 16 bits and takes YCbCr for RGB.
TiffImagePlugin.READ_LIBTIFF = True

# All that ``images`` asks for, before any file is read. Image.init() would import thirty more.
Image.preinit()
for _name in ("Avif", "Jpeg2K", "Mpo", "Sun", "WebP"):
    with suppress(ImportError):  # as init() does: not every Pillow has them all
        import_module(f"PIL.{_name}ImagePlugin")
# What it logs of hostile headers would go to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# What Pillow's parsers are seen to raise on hostile headers.
PARSE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    AssertionError,
    struct.error,
)

_8_BIT_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"})
_16_BIT_MODES = frozenset({"I;16", "I;16B"})
_UNSIGNED, _UNDEFINED = 1, 4
_WHITE_IS_ZERO = 0


@contextmanager
def no_warnings() -> Iterator[None]:
    """Keep Pillow's warnings from the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def opened(data: bytes, formats: list[str]) -> Iterator[Image.Image]:
    """An image whose header is read.

    Raises:
        Exception: Any of ``PARSE_ERRORS``.
    """
    with no_warnings(), Image.open(BytesIO(data), formats=formats) as image:
        yield image


def tiff_orientation(image: Image.Image) -> Orientation:
    """How a TIFF is to be put upright; the size that Pillow gives it is upright already."""
    return Orientation.from_exif(_tags(image).get(ExifTags.Base.Orientation))


def decode(data: bytes, format: str) -> UInt8Array | None:
    """RGB as it is stored, not put upright; None if the file is damaged.

    Raises:
        InputError: ``unsupported`` or ``truncated``.
        MemoryError: If there is too little.
    """
    try:
        with opened(data, [format]) as image:
            if format == "TIFF":
                _check_samples(image)
                # Pillow would turn it, and by XMP too, which its size does not go by.
                image.getexif()[ExifTags.Base.Orientation] = 1
            image.load()
            return _rgb(image)
    except PARSE_ERRORS as error:
        message = str(error)
        if "-9" in message or "out of memory" in message:
            raise MemoryError from error
        if "truncated" in message:
            raise InputError("truncated", "the image file ends early") from error
        return None


def _check_samples(image: Image.Image) -> None:
    formats = _tags(image).get(TiffImagePlugin.SAMPLEFORMAT, (_UNSIGNED,))
    if not set(formats) <= {_UNSIGNED, _UNDEFINED}:
        raise InputError("unsupported", "a TIFF of signed or floating numbers is not supported")


def _rgb(image: Image.Image) -> UInt8Array:
    if image.mode in _16_BIT_MODES:
        return np.repeat(_high_bytes(image)[..., None], 3, axis=2)
    if image.mode not in _8_BIT_MODES:
        message = f"pixels of Pillow's mode {image.mode} are not supported"
        raise InputError("unsupported", message)
    if image.mode == "La":
        image = image.convert("LA")
    return np.array(image.convert("RGB"))


def _high_bytes(image: Image.Image) -> UInt8Array:
    tags = _tags(image)
    # Only of a TIFF are they fewer.
    (num_bits,) = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
    # The copy has the size of its pixels, the image the size that it would have upright.
    high: UInt8Array = (np.asarray(image.copy()) >> (num_bits - 8)).astype(np.uint8)
    is_inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
    return ~high if is_inverted else high


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})
