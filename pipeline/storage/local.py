"""A store in a local (or mounted) folder. Names need not be UTF-8: they use surrogateescape."""

# ruff: noqa: D102 - Store documents the methods

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import xxhash

from pipeline.errors import (
    ObjectExistsError,
    ObjectForbiddenError,
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
)
from pipeline.storage.base import Data, NoHardLinksError, ObjectInfo, OnError, Store
from pipeline.storage.paths import printable

_TEMPORARY_SUFFIX = ".segformer3d-tmp"
_HASHED_BYTES = 64 * 1024
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# What file systems without nameless files say; EISDIR is a kernel without them.
_NEEDS_NAME = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}
# What file systems without hard links say of one: FAT, and some mounts of object stores.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
_BAD_NAME = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ}


class LocalStore(Store):
    """Objects are files below ``root``.

    Args:
        root: An absolute path.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self.url = _url(root)

    def read(self, key: str) -> bytes:
        with self._errors(key), self.open_seekable(key) as file:
            return _read(file)

    def read_with_fingerprint(self, key: str) -> tuple[bytes, str]:
        data = self.read(key)
        tail = data[max(0, len(data) - _HASHED_BYTES) :]
        return data, _fingerprint(len(data), data[:_HASHED_BYTES], tail)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._errors(key), self.open_seekable(key) as file:
            file.seek(start)
            return _read(file, length)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._errors(key):
                status = self._path(key).stat()
        except ObjectNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return ObjectInfo(key=key, size_bytes=status.st_size, etag="")

    def put(self, key: str, data: Data) -> None:
        path = self._path(key)
        with self._errors(key):
            self._refuse_strangers_links(path.parent)
            try:
                with _synced_file(path.parent, data) as source:
                    _replace(source, path)
            except _CannotLinkError:
                with _synced_file(path.parent, data, named=True) as source:
                    source.replace(path)
            _sync_folder(path.parent)

    def create(self, key: str, data: Data) -> None:
        path = self._path(key)
        with self._errors(key):
            self._refuse_strangers_links(path.parent)
            with _synced_file(path.parent, data) as source:
                try:
                    _link(source, path)
                except _CannotLinkError as error:
                    message = (
                        f"{self._name(key)}: this file system has no hard links, without which "
                        "drivers cannot share a job; use another file system or S3"
                    )
                    raise NoHardLinksError(message) from error
                _sync_folder(path.parent)

    def list(
        self, prefix: str = "", *, recursive: bool = True, on_error: OnError | None = None
    ) -> Iterator[ObjectInfo]:
        folder, base = self._folder(prefix), prefix.strip("/")
        status: os.stat_result | None = None
        with self._reported(base, on_error), suppress(FileNotFoundError, NotADirectoryError):
            status = folder.stat()
        if status is not None and stat.S_ISDIR(status.st_mode):
            visit = _Visit(base, _identity(status), self._entries_of(folder, base, on_error))
            yield from self._walk(visit, on_error, recursive=recursive)

    def list_folders(
        self, prefix: str = "", *, follow_links: bool = True, on_error: OnError | None = None
    ) -> Iterator[str]:
        folder, base = self._folder(prefix), prefix.strip("/")
        entries: Iterable[os.DirEntry[str]] = ()
        with self._reported(base, on_error), suppress(FileNotFoundError, NotADirectoryError):
            entries = _entries(folder)
        for entry in entries:
            key = _child(base, entry.name)
            with self._reported(key, on_error):
                if entry.is_dir(follow_symlinks=follow_links):
                    yield key

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with suppress(ObjectNotFoundError), self._errors(key):
                self._refuse_strangers_links(path.parent)
                path.unlink()

    def open_seekable(self, key: str) -> BinaryIO:
        with self._errors(key):
            # Without O_NONBLOCK a named pipe would hang the reader for ever.
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise ObjectNotFoundError(f"{self._name(key)}: not a regular file")
            return os.fdopen(descriptor, "rb")

    def fingerprint(self, key: str) -> str:
        with self._errors(key), self.open_seekable(key) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            head = _read(file, _HASHED_BYTES)
            file.seek(max(0, size_bytes - _HASHED_BYTES))
            return _fingerprint(size_bytes, head, _read(file, _HASHED_BYTES))

    def _walk(
        self, first: "_Visit", on_error: OnError | None, *, recursive: bool
    ) -> Iterator[ObjectInfo]:
        """Depth first, by a stack: folders nest deeper than Python's calls."""
        visits = [first]
        # Links that lead to each other's folders have more paths than anybody can list.
        linked: set[tuple[int, int]] = set()
        while visits:
            visit = visits[-1]
            entry = next(visit.entries, None)
            if entry is None:
                visits.pop()
                continue
            key = _child(visit.base, entry.name)
            status, is_file = self._look(entry, key, on_error)
            if is_file:
                yield ObjectInfo(key=key, size_bytes=status.st_size if status else 0, etag="")
            if status is None or not stat.S_ISDIR(status.st_mode) or not recursive:
                continue
            identity = _identity(status)
            is_linked = visit.is_linked or entry.is_symlink()
            if any(identity == above.identity for above in visits) or (
                is_linked and identity in linked
            ):
                continue
            if is_linked:
                linked.add(identity)
            entries = self._entries_of(Path(entry.path), key, on_error)
            visits.append(_Visit(key, identity, entries, is_linked))

    def _look(
        self, entry: os.DirEntry[str], key: str, on_error: OnError | None
    ) -> tuple[os.stat_result | None, bool]:
        """An entry's status, if it can be known, and whether it is to be listed as a file."""
        is_file = entry.is_symlink()
        with self._reported(key, on_error):
            try:
                status = _status(entry)
            except PermissionError:
                is_file = is_file or entry.is_file(follow_symlinks=False)
                if on_error is None or not is_file:
                    raise
            else:
                return status, is_file if status is None else stat.S_ISREG(status.st_mode)
        return None, is_file

    def _entries_of(
        self, folder: Path, key: str, on_error: OnError | None
    ) -> Iterator[os.DirEntry[str]]:
        entries: Iterable[os.DirEntry[str]] = ()
        with self._reported(key, on_error):
            entries = _entries(folder)
        return iter(entries)

    def _refuse_strangers_links(self, folder: Path) -> None:
        """Refuse to write or delete where another user's link leads, who could not do so himself.

        One's own links are followed, root's, and those of whoever owns the store's folder.
        """
        root = Path(self._root)
        while folder != root:
            owner = _link_owner(folder)
            if owner is not None and owner not in {0, os.geteuid(), root.stat().st_uid}:
                message = f"{printable(str(folder))}: a link that another user placed here"
                raise StorageError(message)
            folder = folder.parent

    def _folder(self, prefix: str) -> Path:
        prefix = prefix.strip("/")
        return self._path(prefix) if prefix else Path(self._root)

    def _path(self, key: str) -> Path:
        if "\0" in key or any(part in {"", ".", ".."} for part in key.split("/")):
            raise StorageError(f"{self._name(key)}: not a key of a local store")
        return Path(self._root, key)

    def _name(self, key: str) -> str:
        return f"{self.url}/{printable(key)}" if key else self.url

    @contextmanager
    def _reported(self, key: str, on_error: OnError | None) -> Iterator[None]:
        """As ``_errors``, but anything below the store's own folder goes to ``on_error``."""
        try:
            with self._errors(key):
                yield
        except StorageError as error:
            if on_error is None or not key:
                raise
            on_error(key, error)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise ObjectExistsError(f"{self._name(key)}: exists already") from error
        except PermissionError as error:
            raise ObjectForbiddenError(f"{self._name(key)}: permission denied") from error
        except OSError as error:
            reason = f"{self._name(key)}: {error.strerror or error}"
            if error.errno in _ABSENT:
                raise ObjectNotFoundError(reason) from error
            if error.errno in _BAD_NAME:
                raise StorageError(reason) from error
            raise StoreUnavailableError(reason) from error
        except UnicodeEncodeError as error:
            raise StorageError(f"{self.url}: no file can be named {key!r}") from error


@dataclass(frozen=True)
class _Visit:
    """A folder that is being listed.

    Attributes:
        base: Its key.
        identity: Device and inode.
        entries: What of it is still to come.
        is_linked: Whether a link led to it, or to a folder above it.
    """

    base: str
    identity: tuple[int, int]
    entries: Iterator[os.DirEntry[str]]
    is_linked: bool = False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _url(root: str) -> str:
    try:
        root.encode()
    except UnicodeEncodeError:
        return Path(root).as_uri()
    return root


def _read(file: BinaryIO, size: int = -1) -> bytes:
    """What a file holds; some of the kernel's own look regular, and would make us wait.

    Raises:
        OSError: If there is nothing now, but there may be later.
    """
    data: bytes | None = file.read(size)
    if data is None:
        raise BlockingIOError(errno.EAGAIN, "not a regular file: it has no end")
    return data


def _fingerprint(size_bytes: int, head: bytes, tail: bytes) -> str:
    digest = xxhash.xxh3_64(head)
    digest.update(tail)
    return f"{size_bytes}-{digest.hexdigest()}"


def _child(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.endswith(_TEMPORARY_SUFFIX)),
            key=lambda entry: entry.name,
        )


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The entry's status; None for a link that leads nowhere, or a file that has just gone."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ELOOP}:
            return None
        raise


@contextmanager
def _synced_file(folder: Path, data: Data, *, named: bool = False) -> Iterator[Path]:
    """A file in ``folder`` that holds ``data``, synced, to be linked; gone at the end.

    It has no name where the file system can do that, so a writer that is killed leaves nothing;
    ``named`` asks for one all the same.
    """
    _make_folder(folder)
    descriptor = None if named else _open_nameless(folder)
    name: Path | None = None
    if descriptor is None:
        name = _temporary_name(folder)
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            yield name or Path(f"/proc/self/fd/{descriptor}")
    finally:
        if name is not None:
            name.unlink(missing_ok=True)


def _open_nameless(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _NEEDS_NAME:
            raise
        return None


class _CannotLinkError(Exception):
    """The file system has no hard links."""


def _link(source: Path, target: Path) -> None:
    """Give a file a name that nobody has; raises ``_CannotLinkError`` where none can have two."""
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Only relative to a folder does Python link what /proc/self/fd leads to.
        os.link(source, target.name, dst_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise _CannotLinkError from error
        raise
    finally:
        os.close(folder)


def _replace(source: Path, target: Path) -> None:
    """Give a file a name, whoever has it."""
    try:
        _link(source, target)
    except _CannotLinkError:
        if source.parent != target.parent:
            raise
        source.replace(target)
    except FileExistsError:
        temporary = _temporary_name(target.parent)
        try:
            _link(source, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary_name(folder: Path) -> Path:
    return folder / f".{uuid4().hex}{_TEMPORARY_SUFFIX}"


def _link_owner(path: Path) -> int | None:
    """User id of whoever placed a link; None if there is no link."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_uid if stat.S_ISLNK(status.st_mode) else None


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
