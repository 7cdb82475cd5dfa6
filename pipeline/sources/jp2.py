"""JPEG 2000: what its decoders take for granted, by the header's boxes and the codestream's."""

import struct
from collections.abc import Iterator

from pipeline.errors import InputError

_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
_CODESTREAM = b"\xff\x4f\xff\x51"
STARTS = (_SIGNATURE, _CODESTREAM)

_END_OF_CODESTREAM = b"\xff\xd9"
_BOX = struct.Struct(">I4s")
_SIZ = struct.Struct(">4xHHIIIIIIIIH")
_COLOUR = struct.Struct(">BxxI")
_ENUMERATED, _PROFILE = 1, 2
_SIGNED = 0x80
# Of the enumerated ones, those that Pillow converts or leaves alone rightly.
_COLOUR_SPACES = frozenset({12, 16, 17, 18})  # CMYK, sRGB, grey, sYCC
_PROFILES = frozenset({b"RGB ", b"GRAY"})
_PROFILE_PLACE = 3 + 16


def is_whole(data: bytes) -> bool:
    """Whether a bare codestream has its end."""
    return data.rstrip(b"\0").endswith(_END_OF_CODESTREAM)


def check(data: bytes, size: tuple[int, int]) -> None:
    """Refuse what would be decoded to other colours, or to a part of the picture.

    Args:
        data: The file.
        size: Width and height that its header promises.

    Raises:
        InputError: ``unsupported`` or ``corrupt``.
    """
    boxes = [] if data.startswith(_CODESTREAM) else list(_boxes(data, 0, len(data)))
    for name, start, end in boxes:
        if name == b"jp2h":
            _check_colours(data, start, end)
    place = next((start for name, start, _ in boxes if name == b"jp2c"), None if boxes else 0)
    if place is not None:
        _check_codestream(data[place:], size)


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of what each box holds; the end may lie beyond the file's."""
    while start + _BOX.size <= end:
        length, name = _BOX.unpack_from(data, start)
        head = _BOX.size
        if length == 1 and start + 16 <= end:
            (length,) = struct.unpack_from(">Q", data, start + head)
            head = 16
        length = end - start if length == 0 else max(length, head)
        yield name, start + head, start + length
        start += length


def _check_colours(data: bytes, start: int, end: int) -> None:
    """By the first colour specification, which is the one that counts."""
    for name, place, _ in _boxes(data, start, min(end, len(data))):
        if name != b"colr" or place + _COLOUR.size > len(data):
            continue
        method, space = _COLOUR.unpack_from(data, place)
        profile = data[place + _PROFILE_PLACE :][:4]
        if method == _ENUMERATED and space not in _COLOUR_SPACES:
            message = f"a JPEG 2000 of colour space {space} is not supported"
            raise InputError("unsupported", message)
        if method == _PROFILE and profile not in _PROFILES:
            raise InputError("unsupported", "a JPEG 2000 of these colours is not supported")
        return


def _check_codestream(data: bytes, size: tuple[int, int]) -> None:
    if len(data) < _SIZ.size or not data.startswith(_CODESTREAM):
        raise InputError("corrupt", "the JPEG 2000 image has no codestream")
    _, _, right, bottom, left, top, *_, num_components = _SIZ.unpack_from(data)
    if (right - left, bottom - top) != size:
        raise InputError("corrupt", "the JPEG 2000 image's headers differ about its size")
    depths = data[_SIZ.size :][: 3 * num_components : 3]
    if any(depth & _SIGNED for depth in depths):
        raise InputError("unsupported", "a JPEG 2000 of signed numbers is not supported")
