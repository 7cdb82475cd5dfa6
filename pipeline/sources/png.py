"""PNG: whether a file is whole, and its still picture without the animation around it."""

import struct
from collections.abc import Iterator

START = b"\x89PNG\r\n\x1a\n"

_CHUNK = struct.Struct(">I4s")
_CHECKSUM_BYTES = 4
_END = b"IEND"
_OF_ANIMATIONS = (b"acTL", b"fcTL", b"fdAT")


def is_whole(data: bytes) -> bool:
    """Whether the last chunk is there."""
    return any(name == _END and end <= len(data) for name, _, end in _chunks(data))


def still(data: bytes) -> bytes:
    """Any file, a PNG without what animates it: its still picture, as plain readers show it.

    OpenCV looks at no checksum of an animation, and takes its missing parts for black.
    """
    if not data.startswith(START) or not any(name in data for name in _OF_ANIMATIONS):
        return data
    kept, start = bytearray(), 0
    for name, first, end in _chunks(data):
        if name in _OF_ANIMATIONS:
            kept += data[start:first]
            start = end
    return bytes(kept + data[start:])


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk up to the last; the end may lie beyond the file's."""
    place = len(START)
    while place + _CHUNK.size <= len(data):
        length, name = _CHUNK.unpack_from(data, place)
        end = place + _CHUNK.size + length + _CHECKSUM_BYTES
        yield name, place, end
        if name == _END:
            return
        place = end
