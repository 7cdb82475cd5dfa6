"""A TIFF's first directory: whether all of its page is there, and where JPEGs lie in it."""

import struct
import zlib
from collections.abc import Iterator

# Classic and big, of both byte orders.
STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_TYPE_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8,
    18: 8,
}  # fmt: skip
_VALUES = {3: "H", 4: "I", 7: "B", 13: "I", 16: "Q"}
# Where strips and tiles lie, and how long they are.
_PLACES, _LENGTHS = (273, 324), (279, 325)
_COMPRESSION, _JPEG_TABLES = 259, 347
_JPEG, _DEFLATE = 7, (8, 32946)
_INFLATED_BYTES = 1 << 20
_MAX_ENTRIES = 65535
# The second is struct's answer to a place that no file has.
_PARSE_ERRORS = (struct.error, OverflowError)
_WANTED = frozenset({*_PLACES, *_LENGTHS, _COMPRESSION, _JPEG_TABLES})


def is_whole(data: bytes) -> bool:
    """Whether nothing of the first page lies beyond the end of the file."""
    try:
        end, values = _read_directory(data)
    except _PARSE_ERRORS:
        return False
    return max(end, *(start + length for start, length in _pieces(values)), 0) <= len(data)


def jpegs(data: bytes) -> Iterator[bytes]:
    """The JPEGs that strips or tiles are, where they are, whole files each."""
    values = _values(data)
    tables = bytes(values.get(_JPEG_TABLES, ()))[:-2]
    for piece in _strips(data, values, _JPEG):
        yield tables + piece[2:] if tables else piece


def fits_checksums(data: bytes) -> bool:
    """Whether deflated strips are what their checksums say, to which libtiff does not look."""
    try:
        for piece in _strips(data, _values(data), *_DEFLATE):
            inflater, rest = zlib.decompressobj(), piece
            while rest and not inflater.eof:
                inflater.decompress(rest, _INFLATED_BYTES)
                rest = inflater.unconsumed_tail
    except zlib.error:
        return False
    return True


def _strips(data: bytes, values: dict[int, tuple[int, ...]], *compressions: int) -> Iterator[bytes]:
    """The strips or tiles, if they are compressed in one of these ways."""
    pieces = _pieces(values)
    # More than there is means that the same data is named again and again: not to be followed.
    if sum(length for _, length in pieces) > len(data):
        return
    if values.get(_COMPRESSION, ())[:1] in [(each,) for each in compressions]:
        yield from (data[start : start + length] for start, length in pieces)


def _values(data: bytes) -> dict[int, tuple[int, ...]]:
    try:
        return _read_directory(data)[1]
    except _PARSE_ERRORS:
        return {}


def _pieces(values: dict[int, tuple[int, ...]]) -> list[tuple[int, int]]:
    """Places and lengths of strips and tiles."""
    found: list[tuple[int, int]] = []
    for places, lengths in zip(_PLACES, _LENGTHS, strict=True):
        found += zip(values.get(places, ()), values.get(lengths, ()), strict=False)
    return found


def _read_directory(data: bytes) -> tuple[int, dict[int, tuple[int, ...]]]:
    """Where the first directory and all its values end, and those that tell of the pixels."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = b"+" in data[:4]
    offset, number, entry = ("Q", "Q", "HHQ") if is_big else ("I", "H", "HHI")
    (directory,) = struct.unpack_from(order + offset, data, 8 if is_big else 4)
    (num_entries,) = struct.unpack_from(order + number, data, directory)
    if num_entries > _MAX_ENTRIES:
        raise struct.error
    inline = struct.calcsize(order + offset)
    head = struct.calcsize(order + entry)
    first = directory + struct.calcsize(order + number)
    end = first + num_entries * (head + inline) + inline
    values: dict[int, tuple[int, ...]] = {}
    for place in range(first, end - inline, head + inline):
        tag, kind, count = struct.unpack_from(order + entry, data, place)
        size, start = _TYPE_BYTES.get(kind, 1) * count, place + head
        if size > inline:
            (start,) = struct.unpack_from(order + offset, data, start)
        end = max(end, start + size)
        if tag in _WANTED and kind in _VALUES and start + size <= len(data):
            values[tag] = struct.unpack_from(f"{order}{count}{_VALUES[kind]}", data, start)
    return end, values
