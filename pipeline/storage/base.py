"""The interface of a store, and what it takes and gives."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import ObjectNotFoundError, StorageError
from pipeline.storage.paths import compile_glob, join_url, literal_glob

Data = bytes | bytearray | memoryview


class NoHardLinksError(StorageError):
    """A local file system on which nothing can be created only once."""


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How to reach S3; credentials are never here but in botocore's chain (env, profile, role).

    Attributes:
        endpoint_url: A server other than AWS; falls back to ``AWS_ENDPOINT_URL_S3``,
            ``AWS_ENDPOINT_URL`` and the profile.
        region: Falls back to ``AWS_REGION``, ``AWS_DEFAULT_REGION`` and the profile.
        anonymous: Send unsigned requests, for public buckets.
    """

    endpoint_url: str | None = None
    region: str | None = None
    anonymous: bool = False


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object, as listed.

    Attributes:
        key: Path relative to the store's URL.
        size_bytes: Its size; 0 for a dangling link.
        etag: S3's ETag without quotes; empty on a local store, see ``Store.fingerprint``.
    """

    key: str
    size_bytes: int
    etag: str


# Takes the key of what a listing leaves out, and why; it may raise.
OnError = Callable[[str, StorageError], None]


class Store(ABC):
    """Objects below one URL, by keys relative to it.

    A store is picklable and thread-safe; its clients are built at first use in each process, so
    it must not cross a ``fork`` after that. Every method raises ``ObjectNotFoundError``,
    ``ObjectForbiddenError``, ``StoreUnavailableError`` or a plain ``StorageError``, each with one
    line that names the URL.

    Attributes:
        url: Where the store is; ``open_store(url, options)`` opens it again, in any process.
        options: How it is reached, resolved from the environment already.
    """

    url: str
    options: StorageOptions = StorageOptions()

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object."""

    def read_with_fingerprint(self, key: str) -> tuple[bytes, str]:
        """The whole object and its ``fingerprint``, of the same bytes where the store can."""
        return self.read(key), self.fingerprint(key)

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """The object's bytes from ``start``; fewer than ``length`` only at its end."""

    def read_range_with_fingerprint(self, key: str, start: int, length: int) -> tuple[bytes, str]:
        """As ``read_range``, of at least one byte, and the whole object's ``fingerprint``."""
        return self.read_range(key, start, length), self.fingerprint(key)

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """What is at ``key``, or None."""

    @abstractmethod
    def put(self, key: str, data: Data) -> None:
        """Write or replace the object atomically; durable on return."""

    @abstractmethod
    def create(self, key: str, data: Data) -> None:
        """Write the object in one step only if there is none; durable on return.

        No error tells whether the write took place; ``create_once`` finds out.
        """

    @abstractmethod
    def list(
        self, prefix: str = "", *, recursive: bool = True, on_error: OnError | None = None
    ) -> Iterator[ObjectInfo]:
        """Every object below the folder ``prefix``, streamed in no promised order.

        Hidden files are included; folder markers, special files and the temporary files of ``put``
        are not. A folder that does not exist is empty. Links to files and folders are followed,
        except from a folder to one that contains it, and each folder by one link at the most: the
        first in the order of names, depth first. With ``on_error``, a folder below the store's
        own that cannot be read is reported and left out, and a file whose size cannot be found out
        has size 0; without it, both raise.
        """

    @abstractmethod
    def list_folders(
        self, prefix: str = "", *, follow_links: bool = True, on_error: OnError | None = None
    ) -> Iterator[str]:
        """Keys of the folders immediately below the folder ``prefix``, without a final slash.

        ``on_error`` as for ``list``.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is absent already is no error."""

    @abstractmethod
    def open_seekable(self, key: str) -> BinaryIO:
        """The object as a seekable file that reads blocks as they are needed, for PyAV."""

    @abstractmethod
    def fingerprint(self, key: str) -> str:
        """What changes with the content: the ETag; locally size and a hash of both ends."""

    def read_small(self, key: str, max_bytes: int) -> bytes:
        """The whole object, unless it is larger than any of its kind: that is a ``StorageError``.

        Asked first, because what somebody else has put there need not fit into memory.
        """
        info = self.head(key)
        if info is None:
            raise not_found(join_url(self.url, key))
        if info.size_bytes > max_bytes:
            message = (
                f"{join_url(self.url, key)}: {info.size_bytes} bytes, more than the {max_bytes} "
                "that any of its kind has"
            )
            raise StorageError(message)
        return self.read(key)

    def exists(self, key: str) -> bool:
        """Whether there is an object at ``key``."""
        return self.head(key) is not None

    def glob(self, pattern: str | None, *, on_error: OnError | None = None) -> Iterator[ObjectInfo]:
        """Every object that ``compile_glob(pattern)`` matches, None meaning all.

        Looks only into folders that the pattern can reach; ``on_error`` as for ``list``.
        """
        if pattern is None:
            return self.list(on_error=on_error)
        return self._glob("", pattern.split("/"), on_error)

    def _glob(
        self, folder: str, segments: Sequence[str], on_error: OnError | None
    ) -> Iterator[ObjectInfo]:
        first, *rest = segments
        base = f"{folder}/" if folder else ""
        name = literal_glob(first)
        if name is not None and rest:
            yield from self._glob(base + name, rest, on_error)
        elif name is not None:
            info = self._head(base + name, on_error)
            if info is not None:
                yield info
        elif rest and first != "**":
            matches = compile_glob(first).fullmatch
            for child in self.list_folders(folder, on_error=on_error):
                if matches(child.removeprefix(base)):
                    yield from self._glob(child, rest, on_error)
        else:
            matches = compile_glob("/".join(segments)).fullmatch
            recursive = bool(rest) or first == "**"
            for info in self.list(folder, recursive=recursive, on_error=on_error):
                if matches(info.key.removeprefix(base)):
                    yield info

    def _head(self, key: str, on_error: OnError | None) -> ObjectInfo | None:
        try:
            return self.head(key)
        except StorageError as error:
            if on_error is None:
                raise
            on_error(key, error)
            return None

    def read_many(
        self, keys: Iterable[str], threads: int = 8
    ) -> Iterator[tuple[str, bytes | StorageError]]:
        """Read objects in parallel and yield them in order; at most ``2 * threads`` are held."""
        pending: deque[tuple[str, Future[bytes | StorageError]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
            try:
                for key in keys:
                    pending.append((key, pool.submit(self._try_read, key)))
                    if len(pending) >= 2 * threads:
                        yield _result(pending)
                while pending:
                    yield _result(pending)
            finally:
                for _, future in pending:
                    future.cancel()

    def _try_read(self, key: str) -> bytes | StorageError:
        try:
            return self.read(key)
        except StorageError as error:
            return error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def _result(
    pending: deque[tuple[str, Future[bytes | StorageError]]],
) -> tuple[str, bytes | StorageError]:
    key, future = pending.popleft()
    return key, future.result()


def not_found(url: str) -> ObjectNotFoundError:
    """The error for an object that is not there."""
    return ObjectNotFoundError(f"{url}: no such object")
