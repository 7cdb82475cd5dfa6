"""A store in a local (or mounted) folder. Names need not be UTF-8: they use surrogateescape."""

# ruff: noqa: D102 - Store documents the methods

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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
from pipeline.storage.base import Data, ObjectInfo, Store
from pipeline.storage.paths import printable

_TEMPORARY_SUFFIX = ".segformer3d-tmp"
_HASHED_BYTES = 64 * 1024
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# What file systems without nameless files say; EISDIR is a kernel without them.
_NEEDS_NAME = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}
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
            return file.read()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._errors(key), self.open_seekable(key) as file:
            file.seek(start)
            return file.read(length)

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
        with self._errors(key), _synced_file(path.parent, data) as source:
            _replace(source, path)
            _sync_folder(path.parent)

    def create(self, key: str, data: Data) -> None:
        path = self._path(key)
        with self._errors(key), _synced_file(path.parent, data) as source:
            _link(source, path)
            _sync_folder(path.parent)

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[ObjectInfo]:
        folder = self._folder(prefix)
        with self._errors(prefix):
            try:
                status = folder.stat()
            except (FileNotFoundError, NotADirectoryError):
                return
        if stat.S_ISDIR(status.st_mode):
            ancestors = ((status.st_dev, status.st_ino),) if recursive else None
            yield from self._walk(folder, prefix.strip("/"), ancestors)

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        folder = self._folder(prefix)
        with self._errors(prefix):
            try:
                names = [entry.name for entry in _entries(folder) if entry.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                return
        base = prefix.strip("/")
        yield from (_child(base, name) for name in names)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with suppress(ObjectNotFoundError), self._errors(key):
                self._path(key).unlink()

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
            digest = xxhash.xxh3_64(file.read(_HASHED_BYTES))
            file.seek(max(0, size_bytes - _HASHED_BYTES))
            digest.update(file.read(_HASHED_BYTES))
        return f"{size_bytes}-{digest.hexdigest()}"

    def _walk(
        self, folder: Path, base: str, ancestors: tuple[tuple[int, int], ...] | None
    ) -> Iterator[ObjectInfo]:
        with self._errors(base):
            entries = _entries(folder)
        for entry in entries:
            key = _child(base, entry.name)
            with self._errors(key):
                status = _status(entry)
            if status is None:
                if entry.is_symlink():
                    yield ObjectInfo(key=key, size_bytes=0, etag="")
                continue
            if stat.S_ISREG(status.st_mode):
                yield ObjectInfo(key=key, size_bytes=status.st_size, etag="")
            elif stat.S_ISDIR(status.st_mode) and ancestors is not None:
                identity = (status.st_dev, status.st_ino)
                if identity not in ancestors:
                    yield from self._walk(Path(entry.path), key, (*ancestors, identity))

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


def _url(root: str) -> str:
    try:
        root.encode()
    except UnicodeEncodeError:
        return Path(root).as_uri()
    return root


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
def _synced_file(folder: Path, data: Data) -> Iterator[Path]:
    """A file in ``folder`` that holds ``data``, synced, to be linked; gone at the end.

    It has no name where the file system can do that, so a writer that is killed leaves nothing.
    """
    _make_folder(folder)
    named: Path | None = None
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _NEEDS_NAME:
            raise
        named = _temporary_name(folder)
        descriptor = os.open(named, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            yield named or Path(f"/proc/self/fd/{descriptor}")
    finally:
        if named is not None:
            named.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Give a file a name that nobody has."""
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Only relative to a folder does Python link what /proc/self/fd leads to.
        os.link(source, target.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _replace(source: Path, target: Path) -> None:
    """Give a file a name, whoever has it."""
    try:
        _link(source, target)
    except FileExistsError:
        temporary = _temporary_name(target.parent)
        try:
            _link(source, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary_name(folder: Path) -> Path:
    return folder / f".{uuid4().hex}{_TEMPORARY_SUFFIX}"


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
