"""BMPs that say which bits of a pixel are which channel, which OpenCV does not ask them."""

import struct

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import UInt8Array
from pipeline.sources.assets import DecodeLimits, check_pixels, nearest_of_8_bits

_START = b"BM"
_MASKED = (3, 6)
_HEADER = struct.Struct("<10xIIiiHHI")
_MASKS = struct.Struct("<3I")
_MASKS_OFFSET = 54
_DTYPES = {16: "<u2", 32: "<u4"}
# What masks of nothing mean: the same as none.
_USUAL_MASKS = {16: (0x7C00, 0x3E0, 0x1F), 32: (0xFF0000, 0xFF00, 0xFF)}


def has_masks(data: bytes) -> bool:
    """Whether a file is such a BMP."""
    if not data.startswith(_START) or len(data) < _HEADER.size:
        return False
    _, header_bytes, *_, compression = _HEADER.unpack_from(data)
    return header_bytes >= 40 and compression in _MASKED


def decode(data: bytes, limits: DecodeLimits) -> UInt8Array:
    """RGB pixels of a BMP with masks; what is neither red, green nor blue is dropped.

    Raises:
        InputError: ``too_large``, ``truncated``, ``corrupt`` or ``unsupported``.
    """
    offset, _, width, height, _, num_bits, _ = _HEADER.unpack_from(data)
    check_pixels(width, abs(height), limits)
    if width <= 0 or height == 0:
        raise InputError("corrupt", "the BMP image has no pixels")
    if num_bits not in _DTYPES:
        raise InputError("unsupported", f"a BMP of {num_bits} masked bits is not supported")
    row_bytes = (width * num_bits + 31) // 32 * 4
    if max(offset + row_bytes * abs(height), _MASKS_OFFSET + _MASKS.size) > len(data):
        raise InputError("truncated", "the image file ends early")
    rows = np.frombuffer(data, np.uint8, row_bytes * abs(height), offset).reshape(-1, row_bytes)
    values = rows[:: 1 if height < 0 else -1].view(_DTYPES[num_bits])[:, :width]
    pixels = np.empty((abs(height), width, 3), np.uint8)
    masks = _MASKS.unpack_from(data, _MASKS_OFFSET)
    for channel, mask in enumerate(masks if any(masks) else _USUAL_MASKS[num_bits]):
        pixels[..., channel] = _channel(values, mask & (1 << num_bits) - 1)
    return pixels


def _channel(values: NDArray[np.unsignedinteger], mask: int) -> UInt8Array:
    """The bits of a mask as 8: the high ones of more, the nearest of fewer."""
    if mask == 0:
        return np.zeros(values.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    excess = max(0, (mask >> shift).bit_length() - 8)
    high = (values & mask) >> (shift + excess)
    largest = mask >> (shift + excess)
    scaled: UInt8Array = nearest_of_8_bits(largest)[high]
    return scaled
