"""Tar files, read where they lie: members become assets of their own, and nothing is extracted.

Runs in the decoding child only. Of a name that stands twice the last one counts, as for tar itself.
What comes behind damage is lost, which is said of the tar; what came before it is not.
"""

import tarfile
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from pipeline.errors import ErrorKind
from pipeline.records import Asset
from pipeline.sources.assets import AssetProbe
from pipeline.sources.listing import asset_kind, is_hidden
from pipeline.storage import escape_path, unescape_path

MAX_NAME_BYTES = 1024  # as for a key of S3

Fault = tuple[ErrorKind, str]


class _Header(tarfile.TarInfo):
    """A header whose size cannot send the reader backwards, for ever (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("a size is negative")
        size_bytes: int = super()._block(count)  # type: ignore[misc]
        return size_bytes


def probe_tar(file: BinaryIO, asset: Asset, beat: Callable[[], None]) -> AssetProbe:
    """List the images and videos of a tar file by its headers alone.

    Args:
        file: The tar, seekable.
        asset: Its asset.
        beat: Called at every member.

    Returns:
        A probe with ``members``; one that lacks some says so in ``missing_error``, and one that
        has none in ``error``.
    """
    members: dict[str, Asset] = {}
    fault = _read(file, asset, members, beat)
    if not members:
        kind, message = fault or ("unsupported", "the tar holds no image or video")
        return AssetProbe(asset=asset, error_kind=kind, error=message)
    probe = AssetProbe(asset=asset, members=tuple(members.values()))
    return probe if fault is None else replace(probe, missing_kind=fault[0], missing_error=fault[1])


def _read(
    file: BinaryIO, asset: Asset, members: dict[str, Asset], beat: Callable[[], None]
) -> Fault | None:
    """Fill in ``members``; what is wrong with the tar, if anything."""
    if not asset.size_bytes:
        return "truncated", "the file is empty"
    num_overlong = offset = 0
    try:
        with tarfile.TarFile(fileobj=file, tarinfo=_Header) as tar:
            while (header := tar.next()) is not None:
                beat()
                offset = tar.offset
                vars(tar)["members"].clear()  # or it keeps every one
                if header.offset_data + header.size > asset.size_bytes:
                    return "truncated", "the tar ends within a member"
                if len(header.name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
                    num_overlong += 1
                else:
                    _take(header, asset, members)
            fault = _end(file, offset)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if asset.size_bytes - offset < tarfile.BLOCKSIZE:
            return "truncated", f"the tar ends where a header is due, at byte {offset}"
        return "corrupt", f"not a tar file, from byte {offset}: {error}"
    if fault is None and num_overlong:
        names = "a name" if num_overlong == 1 else "names"
        message = f"{num_overlong} members with {names} of over {MAX_NAME_BYTES} bytes: left out"
        return "unsupported", message
    return fault


def _take(header: tarfile.TarInfo, asset: Asset, members: dict[str, Asset]) -> None:
    name = header.name.removeprefix("./")
    kind = asset_kind(name)
    if kind is None or is_hidden(name) or not header.isreg() or header.issparse():
        return
    path = escape_path(f"{unescape_path(asset.path)}/{name}")
    members.pop(path, None)  # an earlier one's place in the order is gone as well
    members[path] = Asset(
        path=path,
        kind=kind,
        size_bytes=header.size,
        etag=asset.etag,
        container=asset.path,
        offset=header.offset_data,
    )


def _end(file: BinaryIO, offset: int) -> Fault | None:
    """What stands where the headers end: zeros, or ``tarfile`` has given up."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "truncated", f"the tar ends where a header is due, at byte {offset}"
    if any(block):
        return "corrupt", f"no member's header at byte {offset}"
    return None
