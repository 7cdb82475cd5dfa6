"""Tar files, read where they lie: members become assets of their own, and nothing is extracted.

Runs in the decoding child only. Headers are read as POSIX.1-2001 (ustar and pax) and GNU tar write
them, here and not by Python's ``tarfile``: that one recurses, searches pax records in quadratic
time, takes GNU's times for a part of the name, and ends without a word at a damaged header.

Of a name that stands twice the last one counts, as for tar itself. What comes behind damage is
lost, which is said of the tar; what came before it is not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from pipeline.errors import ErrorKind
from pipeline.records import Asset
from pipeline.sources import signatures
from pipeline.sources.assets import MIB_BYTES, AssetProbe
from pipeline.sources.listing import asset_kind, is_hidden
from pipeline.storage import escape_path, unescape_path

BLOCK_BYTES = 512
MAX_NAME_BYTES = 512
_MAX_RECORDS_BYTES = MIB_BYTES  # of a pax header or a long name, of which a few kilobytes are usual
_MAX_REST_BYTES = 1024 * MIB_BYTES
_REGULAR = frozenset(b"\x0007")
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, pipes
_SPARSE_MARK = b"GNU.sparse."
_ZEROS = bytes(BLOCK_BYTES)


class _Damage(Exception):  # noqa: N818 - it never leaves this module
    """Where a tar stops making sense."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


@dataclass(frozen=True)
class _Member:
    """One entry: its name without a final NUL, and where its bytes are stored."""

    name: bytes
    offset: int
    size_bytes: int
    is_regular: bool
    is_sparse: bool


def probe_tar(file: BinaryIO, asset: Asset, beat: Callable[[], None]) -> AssetProbe:
    """List the images and videos of a tar file by its headers alone.

    Args:
        file: The tar, seekable.
        asset: Its asset.
        beat: Called at every header.

    Returns:
        A probe with ``members``; one that lacks some says so in ``missing_error``, and one that
        has none in ``error``.
    """
    members: dict[str, Asset] = {}
    left_out = {"overlong": 0, "sparse": 0, "named outside": 0}
    fault: tuple[ErrorKind, str] | None = None
    try:
        for member in _members(file, asset.size_bytes, beat):
            reason = _take(member, asset, members)
            if reason is not None:
                left_out[reason] += 1
    except _Damage as damage:
        fault = damage.kind, damage.message
    if fault is None and any(left_out.values()):
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        fault = "unsupported", f"left out are members: {counts}"
    if not members:
        compression = _compression(file)
        if compression is not None:
            fault = "unsupported", f"a compressed tar is not supported ({compression})"
        kind, message = fault or ("unsupported", "the tar holds no image or video")
        return AssetProbe(asset=asset, error_kind=kind, error=message)
    probe = AssetProbe(asset=asset, members=tuple(members.values()))
    return probe if fault is None else replace(probe, missing_kind=fault[0], missing_error=fault[1])


def _compression(file: BinaryIO) -> str | None:
    file.seek(0)
    return signatures.compression(file.read(signatures.HEAD_BYTES))


def _take(member: _Member, tar: Asset, members: dict[str, Asset]) -> str | None:
    """Note a member, or say why not; of what is no image or video nothing is said."""
    # As it would lie on disk: neither an absolute path nor an empty segment makes another file.
    segments = [part for part in member.name.split(b"/") if part not in {b"", b"."}]
    name = b"/".join(segments)
    text = name.decode("utf-8", "surrogateescape")
    kind = asset_kind(text)
    if kind is None or not member.is_regular or member.name.endswith(b"/"):
        return None
    if b".." in segments:
        return "named outside"
    if is_hidden(text):
        return None
    if member.is_sparse:
        return "sparse"
    if len(name) > MAX_NAME_BYTES:
        return "overlong"
    path = escape_path(f"{unescape_path(tar.path)}/{text}")
    members.pop(path, None)  # an earlier one's place in the order is gone as well
    members[path] = Asset(
        path=path,
        kind=kind,
        size_bytes=member.size_bytes,
        etag=tar.etag,
        container=tar.path,
        offset=member.offset,
    )
    return None


def _members(file: BinaryIO, end: int, beat: Callable[[], None]) -> Iterator[_Member]:
    """Every entry, in order.

    Raises:
        _Damage: Where the tar cannot be read on.
    """
    if not end:
        raise _Damage("truncated", "the file is empty")
    offset = 0
    records: dict[bytes, bytes] = {}
    while (block := _block(file, offset)) != _ZEROS:
        beat()
        kind, size = block[156], _size(block, offset)
        stored, is_sparse = _after_sparse_map(file, offset, block)
        if kind in b"xgLK":
            if kind != ord("g"):  # of a global header nothing is about one member
                records |= _records(file, kind, stored, size, end)
            offset = stored + _padded(size)
            continue
        size = _number(records[b"size"], offset) if b"size" in records else size
        size = 0 if kind in _WITHOUT_DATA else size
        if stored + size > end:
            raise _Damage("truncated", "the tar ends within a member")
        yield _Member(
            name=records.get(b"path") or _name(block),
            offset=stored,
            size_bytes=size,
            is_regular=kind in _REGULAR or is_sparse,
            is_sparse=is_sparse or any(key.startswith(_SPARSE_MARK) for key in records),
        )
        records = {}
        offset = stored + _padded(size)
    _check_rest(file, offset, beat)


def _block(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    block = file.read(BLOCK_BYTES)
    if len(block) < BLOCK_BYTES:
        raise _Damage("truncated", f"the tar ends where a header is due, at byte {offset}")
    if block == _ZEROS:
        return block
    # The sum of all bytes, its own field taken as blanks; old tars summed signed ones.
    summed = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(summed)
    signed = unsigned - 256 * sum(byte > 127 for byte in summed)
    if _octal(block[148:156]) not in {unsigned, signed}:
        raise _Damage("corrupt", f"no member's header at byte {offset}")
    return block


def _size(block: bytes, offset: int) -> int:
    """Octal digits, or base 256 behind a set bit (GNU)."""
    field = block[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    size = _octal(field.strip(b" \0") or b"0")
    if size is None:
        raise _Damage("corrupt", f"a header without a size at byte {offset}")
    return size


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and max(digits) <= ord("7") else None


def _number(digits: bytes, offset: int) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise _Damage("corrupt", f"a size that is no number before byte {offset}")
    return int(digits)


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0")[0]
    # GNU tar keeps times where POSIX has the front of the name.
    is_posix = block[257:263] == b"ustar\0"
    prefix = block[345:500].split(b"\0")[0] if is_posix else b""
    return prefix + b"/" + name if prefix else name


def _after_sparse_map(file: BinaryIO, offset: int, block: bytes) -> tuple[int, bool]:
    """Where the data begins, and whether a map of holes stood before it (GNU's old format)."""
    stored, is_sparse = offset + BLOCK_BYTES, block[156] == ord("S")
    goes_on = is_sparse and block[482] != 0
    while goes_on:
        file.seek(stored)
        more = file.read(BLOCK_BYTES)
        if len(more) < BLOCK_BYTES:
            raise _Damage("truncated", "the tar ends within a map of holes")
        goes_on = more[504] != 0
        stored += BLOCK_BYTES
    return stored, is_sparse


def _records(
    file: BinaryIO, kind: int, offset: int, size_bytes: int, end: int
) -> dict[bytes, bytes]:
    """What a header says of the member behind it."""
    if offset + size_bytes > end:
        raise _Damage("truncated", "the tar ends within a header")
    if size_bytes > _MAX_RECORDS_BYTES:
        raise _Damage("corrupt", f"a header of {size_bytes} bytes at byte {offset}")
    file.seek(offset)
    data = file.read(size_bytes)
    if kind == ord("L"):
        return {b"path": data.split(b"\0")[0]}
    return dict(_pax(data, offset)) if kind == ord("x") else {}


def _pax(data: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    r"""Records ``LENGTH KEY=VALUE\n``, the length being that of the whole."""
    place = 0
    while place < len(data) and data[place]:
        digits, blank, _ = data[place : place + 20].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        record = data[place : place + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or len(record) != length or not record.endswith(b"\n"):
            raise _Damage("corrupt", f"a malformed header at byte {offset}")
        yield key, value
        place += length


def _check_rest(file: BinaryIO, offset: int, beat: Callable[[], None]) -> None:
    """Behind the end mark there is nothing but zeros; a hole in a file looks like one."""
    file.seek(offset)
    for _ in range(_MAX_REST_BYTES // MIB_BYTES):
        rest = file.read(MIB_BYTES)
        beat()
        if rest.count(0) != len(rest):
            raise _Damage("corrupt", f"more follows behind the end mark at byte {offset}")
        if not rest:
            return


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
