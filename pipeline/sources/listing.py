"""From a store to the sorted list of its images, videos and tar files."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol, TypeVar

from pipeline.errors import StorageError, StoreUnavailableError
from pipeline.records import Asset, AssetKind
from pipeline.storage import ObjectInfo, Store, escape_path

IMAGE_EXTENSIONS = frozenset(
    [
        "avif",
        "bmp",
        "dib",
        "gif",
        "hdr",
        "jfif",
        "jp2",
        "jpe",
        "jpeg",
        "jpg",
        "pam",
        "pbm",
        "pgm",
        "pic",
        "png",
        "pnm",
        "ppm",
        "ras",
        "sr",
        "tif",
        "tiff",
        "webp",
    ]
)
VIDEO_EXTENSIONS = frozenset("avi m2ts m4v mkv mov mp4 mts ts webm".split())  # noqa: SIM905
TAR_EXTENSION = "tar"

# A fingerprint takes 0.04 ms where the file is in memory, and there threads wait for each other:
# four times as long. From a network's folder it takes this and more, and threads wait together.
_FAR_S = 0.0005
_FILES_AT_A_TIME = 32
_SLOW_TURNS_MAX = 2  # in a row: once may be a machine that is busy

T = TypeVar("T")


class Watch(Protocol):
    """Passes items through, and tells somebody how many there were."""

    def __call__(
        self, items: Iterable[T], what: str, *, total: int | None = None, unit: str
    ) -> Iterator[T]:
        """Pass them through."""


def _unwatched(items: Iterable[T], *_: object, **__: object) -> Iterator[T]:
    return iter(items)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What an archive holds.

    Attributes:
        assets: Images, videos and tars, sorted by the bytes of their escaped paths.
        num_hidden: Files skipped because they or a folder above them start with a dot.
        ignored: Number of other files that are no asset, by lower-case extension.
        num_unreadable: Folders skipped because they cannot be listed.
    """

    assets: tuple[Asset, ...]
    num_hidden: int
    ignored: Mapping[str, int]
    num_unreadable: int = 0

    @property
    def num_ignored(self) -> int:
        """Files that are neither hidden nor an asset by extension."""
        return sum(self.ignored.values())


def list_assets(
    store: Store,
    pattern: str | None = None,
    *,
    wanted: Callable[[str], bool] | None = None,
    with_tars: bool = False,
    threads: int = 16,
    watch: Watch = _unwatched,
) -> Listing:
    """List the images and videos of an archive, by extension, in all its folders.

    A file that cannot be read is listed with an empty ETag, for its probe to say why.

    Args:
        store: The archive.
        pattern: Glob for ``compile_glob`` that keys must match; None for everything.
        wanted: Says of a key whether it is part of the archive; None for all.
        with_tars: Whether tar files are assets, too.
        threads: Files fingerprinted at a time, where the listing itself has no ETag, and reading
            is slow.
        watch: Told of what is listed, then of what is fingerprinted.

    Raises:
        StorageError: If the store cannot be listed.
    """
    found: dict[str, tuple[ObjectInfo, AssetKind]] = {}
    ignored: Counter[str] = Counter()
    unreadable: set[str] = set()
    num_hidden = 0

    def skip(key: str, error: StorageError) -> None:
        # A store that is merely unavailable must not make the archive smaller.
        if isinstance(error, StoreUnavailableError):
            raise error
        if not is_hidden(key) and (wanted is None or wanted(f"{key}/")):
            unreadable.add(key)

    for info in watch(store.glob(pattern, on_error=skip), "listing", unit="files"):
        if wanted is not None and not wanted(info.key):
            continue
        kind = asset_kind(info.key) or ("tar" if with_tars and is_tar(info.key) else None)
        if is_hidden(info.key):
            num_hidden += 1
        elif kind is None:
            ignored[_extension(info.key)] += 1
        else:
            found[escape_path(info.key)] = info, kind
    described = watch(
        _assets(store, found, threads), "looking at files", total=len(found), unit="files"
    )
    assets = sorted(described, key=lambda asset: asset.path.encode())
    return Listing(
        assets=tuple(assets),
        num_hidden=num_hidden,
        ignored=dict(sorted(ignored.items())),
        num_unreadable=len(unreadable),
    )


def asset_kind(key: str) -> AssetKind | None:
    """Whether a file is read as an image or a video, by its extension in any case."""
    extension = _extension(key)
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "video" if extension in VIDEO_EXTENSIONS else None


def is_tar(key: str) -> bool:
    """Whether a file is read for its members, by its extension in any case."""
    return _extension(key) == TAR_EXTENSION


def is_hidden(key: str) -> bool:
    """Whether a file or a folder above it starts with a dot."""
    return any(segment.startswith(".") for segment in key.split("/"))


def _assets(
    store: Store, found: Mapping[str, tuple[ObjectInfo, AssetKind]], threads: int
) -> Iterator[Asset]:
    def describe(path: str) -> Asset:
        info, kind = found[path]
        try:
            etag = info.etag or store.fingerprint(info.key)
        except StorageError:
            etag = ""
        return Asset(path=path, kind=kind, size_bytes=info.size_bytes, etag=etag)

    paths, num_slow = iter(found), 0
    with ThreadPoolExecutor(threads, thread_name_prefix="fingerprint") as pool:
        while turn := list(itertools.islice(paths, _FILES_AT_A_TIME)):
            started_s = time.perf_counter()
            described = [describe(path) for path in turn]
            took_s = time.perf_counter() - started_s
            yield from described
            num_slow = num_slow + 1 if took_s > _FAR_S * len(turn) else 0
            if num_slow == _SLOW_TURNS_MAX:
                yield from pool.map(describe, paths)


def _extension(key: str) -> str:
    return PurePosixPath(key).suffix.removeprefix(".").lower()
