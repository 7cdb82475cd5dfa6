"""What the structure of a video file says of its being whole. Reads a few bytes here and there."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import SEEK_END
from typing import BinaryIO

_MAX_BOXES = 10_000
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_EBML_HEAD_BYTES = 256
_MAX_INDEX_BYTES = 1 << 20


@dataclass(frozen=True)
class _Box:
    """A top-level box of an MP4 or MOV."""

    name: bytes
    start: int
    head_bytes: int
    end: int


def lacks_index(file: BinaryIO) -> bool:
    """Whether it is an MP4 or MOV that ends before its index."""
    names = [box.name for box in _boxes(file)]
    return bool(names) and b"moov" not in names


def is_cut(file: BinaryIO) -> bool:
    """Whether a Matroska file, or an MP4 in fragments, says that there should be more of it."""
    end = file.seek(0, SEEK_END)
    segment_end = _segment_end(file)
    if segment_end is not None:
        return segment_end > end
    for box in _boxes(file):
        if box.name in {b"moof", b"mdat"} and box.end > end:
            return True
        if box.name == b"sidx" and _indexed_end(file, box) > end:
            return True
    return False


def _boxes(file: BinaryIO) -> Iterator[_Box]:
    """Nothing of what is no MP4 or MOV."""
    start, end = 0, file.seek(0, SEEK_END)
    for _ in range(_MAX_BOXES):
        if start >= end:
            return
        file.seek(start)
        head = file.read(16).ljust(16, b"\0")
        length, name = struct.unpack_from(">I4s", head)
        if start == 0 and name != b"ftyp":
            return
        if length == 1:
            (length,) = struct.unpack_from(">Q", head, 8)
        yield _Box(name, start, 16 if head[:4] == b"\0\0\0\1" else 8, start + max(length, 8))
        if length < 8:
            return
        start += length


def _indexed_end(file: BinaryIO, box: _Box) -> int:
    """Where the fragments end that a segment index lists (ISO/IEC 14496-12, 8.16.3)."""
    file.seek(box.start + box.head_bytes)
    data = file.read(min(box.end - box.start - box.head_bytes, _MAX_INDEX_BYTES))
    wide = bool(data) and data[0] > 0
    places = struct.Struct(">QQ" if wide else ">II")
    try:
        _, first_offset = places.unpack_from(data, 12)
        (count,) = struct.unpack_from(">H", data, 12 + places.size + 2)
        entries = struct.iter_unpack(">III", data[12 + places.size + 4 :][: 12 * count])
        return int(box.end + first_offset + sum(entry[0] & 0x7FFFFFFF for entry in entries))
    except struct.error:
        return 0


def _segment_end(file: BinaryIO) -> int | None:
    """Where a Matroska file's segment ends (RFC 8794, 9559); None of others, and of live ones."""
    file.seek(0)
    data = file.read(_EBML_HEAD_BYTES)
    if not data.startswith(_EBML):
        return None
    header = _size(data, len(_EBML))
    if header is None:
        return None
    start = header[0] + header[1]
    if data[start : start + len(_SEGMENT)] != _SEGMENT:
        return None
    segment = _size(data, start + len(_SEGMENT))
    return None if segment is None else segment[0] + segment[1]


def _size(data: bytes, start: int) -> tuple[int, int] | None:
    """Where an element's content starts, and its length; None if that is not known."""
    if start >= len(data) or not data[start]:
        return None
    width = 9 - data[start].bit_length()
    field = data[start : start + width]
    value = int.from_bytes(field) & ((1 << 7 * width) - 1)
    if len(field) < width or value == (1 << 7 * width) - 1:
        return None
    return start + width, value
