"""What a user names -> files -> upright frames, in this process: for the verbs without a job.

Frames come of the very functions that a job's decoding child calls. A file that crashes a decoder
ends the process here, which a job would survive.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast
from urllib.parse import unquote, urlsplit

import av
import cv2

from jobs.progress import say, track
from pipeline.errors import (
    ErrorKind,
    InputError,
    ObjectForbiddenError,
    ObjectNotFoundError,
    StorageError,
    UserError,
)
from pipeline.geometry import UInt8Array
from pipeline.records import Asset, AssetKind
from pipeline.sources.assets import AssetProbe, DecodeLimits
from pipeline.sources.images import HEAD_BYTES, decode_image, read_header
from pipeline.sources.listing import asset_kind, list_assets
from pipeline.sources.video import probe_video
from pipeline.sources.video_file import quiet_ffmpeg
from pipeline.sources.video_frames import read_frames
from pipeline.storage import StorageOptions, Store, escape_path, open_input, unescape_path
from pipeline.storage.paths import literal_glob
from pipeline.urls import FILES, STORE_SCHEMES, WEB_SCHEMES, check_scheme, shown
from pipeline.web import open_web

# Of a video behind a URL that is no store's: it is copied to a temporary file to be sought in.
MAX_DOWNLOAD_BYTES = 8 << 30
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One image or video that the user named.

    Attributes:
        path: Its path relative to what was named, the file's name where that was the file; escaped
            as in a job, and never one that leads out of the folder that it is joined to.
        kind: Whether it is read as a still image or as a video.
        open: Gives it as a seekable file; raises ``StorageError`` or ``OSError``.
        local_path: Where it lies, if that is a local store.
    """

    path: str
    kind: AssetKind
    open: Callable[[], BinaryIO]
    local_path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the user named.

    Attributes:
        files: The images and videos, sorted by path; at least one.
        is_file: Whether a single file was named, not a folder or a glob.
    """

    files: tuple[SourceFile, ...]
    is_file: bool


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a file, in presentation order.

    Attributes:
        index: Its rank; 0 for an image.
        pixels: uint8 ``(H, W, 3)`` RGB, upright, at the file's own size; None if there is an error.
        error_kind: Set if it cannot be had.
        error: The message that goes with it.
    """

    index: int
    pixels: UInt8Array | None = None
    error_kind: ErrorKind | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Footage:
    """One opened file.

    Attributes:
        kind: Image or video.
        width: Width of its upright frames in pixels.
        height: Height, likewise.
        pts: A video's frames in presentation order, in ticks; empty for an image.
        time_base: Seconds per tick.
        num_missing: Frames that the file promises and does not hold.
        missing_kind: Their kind of error.
        missing_error: The message that goes with it.
        frames: Every frame, once, in order of ``index``.
    """

    kind: AssetKind
    width: int
    height: int
    frames: Iterator[Frame]
    pts: tuple[int, ...] = ()
    time_base: Fraction = Fraction(1)
    num_missing: int = 0
    missing_kind: ErrorKind | None = None
    missing_error: str | None = None

    @property
    def num_frames(self) -> int:
        """How many frames ``frames`` gives."""
        return len(self.pts) if self.kind == "video" else 1


def find_files(url: str, storage: StorageOptions, *, skip: Path | None = None) -> Found:
    """Find the images and videos that a user names.

    Args:
        url: A file, a folder or a glob, local or ``s3://``; or the ``https://`` URL of a file.
        storage: How to reach S3.
        skip: The local folder where this run writes, whose files do not count.

    Raises:
        UserError: If there is nothing there, or ``skip`` is what was named.
        StorageError: If it cannot be listed.
    """
    if check_scheme(url, STORE_SCHEMES | WEB_SCHEMES, FILES) in WEB_SCHEMES:
        return Found(files=(_remote_file(url),), is_file=True)
    if not _may_exist(url):
        message = f"{url}: no such file or folder"
        raise UserError(message)
    store, pattern = open_input(url, storage)
    name = None if pattern is None else literal_glob(pattern)
    if name is not None and store.exists(name):
        return Found(files=(_stored_file(store, name, _kind(store, name)),), is_file=True)
    return Found(files=_listed_files(store, pattern, skip, url), is_file=False)


@contextmanager
def open_footage(file: SourceFile, limits: DecodeLimits) -> Iterator[Footage]:
    """Open a file to read its frames, one at a time.

    Raises:
        InputError: If it cannot be read.
    """
    with _typed_errors():
        opened = file.open()
    with opened:
        if file.kind == "image":
            with _typed_errors():
                pixels, _ = decode_image(_read_image(opened, limits), limits)
            height, width = pixels.shape[:2]
            frames = iter([Frame(index=0, pixels=pixels)])
            yield Footage(kind="image", width=width, height=height, frames=frames)
            return
        quiet_ffmpeg()
        with _typed_errors():
            probe = probe_video(opened, _asset(file), limits, _no_progress)
        yield Footage(
            kind="video",
            width=probe.width,
            height=probe.height,
            pts=probe.pts,
            time_base=probe.time_base,
            num_missing=probe.num_missing,
            missing_kind=probe.missing_kind,
            missing_error=probe.missing_error,
            frames=_video_frames(opened, probe, limits),
        )


def _video_frames(file: BinaryIO, probe: AssetProbe, limits: DecodeLimits) -> Iterator[Frame]:
    """Every frame of a video in order: those that cannot be decoded come in their places too."""
    size = probe.width, probe.height
    expected = 0
    if not probe.pts:
        return
    with _typed_errors():
        # One pass from the beginning gives the good frames in order, then why the others failed.
        for outcome in read_frames(file, probe.pts, None, size, limits, _no_progress):
            if outcome.position < expected:
                continue
            for index in range(expected, outcome.position):
                yield _damaged(index)
            expected = outcome.position + 1
            yield Frame(
                index=outcome.position,
                pixels=outcome.pixels,
                error_kind=outcome.error_kind,
                error=outcome.error,
            )
    for index in range(expected, len(probe.pts)):
        yield _damaged(index)


def _damaged(index: int) -> Frame:
    return Frame(index=index, error_kind="corrupt", error="the frame cannot be decoded")


def _read_image(file: BinaryIO, limits: DecodeLimits) -> bytes:
    data = file.read(limits.max_file_bytes + 1)
    if len(data) > limits.max_file_bytes:
        message = f"the file has more than {limits.max_file_bytes} bytes"
        raise InputError("too_large", message)
    return data


def _may_exist(url: str) -> bool:
    """Whether a URL names a path that exists, or is for the store to look up."""
    if "://" in url or any(character in url for character in "*?["):
        return True
    try:
        return Path(url).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return True


def _stored_file(store: Store, key: str, kind: AssetKind) -> SourceFile:
    return SourceFile(
        path=_joinable(escape_path(key)),
        kind=kind,
        open=lambda: store.open_seekable(key),
        local_path=None if "://" in store.url else Path(store.url, key),
    )


def _joinable(path: str) -> str:
    """A key of S3 may begin with a slash; joined to a folder it would lead to the file system."""
    return f"%2F{path[1:]}" if path.startswith("/") else path


def _kind(store: Store, key: str) -> AssetKind:
    """A file that is named is read whatever its name: as an image, if it has an image's header."""
    known = asset_kind(key)
    if known is not None:
        return known
    return "image" if read_header(store.read_range(key, 0, HEAD_BYTES)) else "video"


def _listed_files(
    store: Store, pattern: str | None, skip: Path | None, url: str
) -> tuple[SourceFile, ...]:
    root = None if "://" in store.url else Path(store.url).resolve()
    if skip is not None and skip == root:
        message = f"--output {skip}: this is the input; name another folder"
        raise UserError(message)
    own = None
    if root is not None and skip is not None and skip.is_relative_to(root):
        own = f"{skip.relative_to(root)}/"

    def wanted(key: str) -> bool:
        return own is None or not key.startswith(own)

    listing = list_assets(store, pattern, wanted=wanted, watch=track)
    if listing.num_unreadable:
        say(f"{listing.num_unreadable} folders could not be read: left out.")
    if not listing.assets:
        message = f"{url}: no image or video here ({listing.num_ignored} other files)"
        raise UserError(message)
    return tuple(
        _stored_file(store, unescape_path(asset.path), asset.kind) for asset in listing.assets
    )


def _remote_file(url: str) -> SourceFile:
    """A file on the web."""
    try:
        with open_web(url) as opened:
            head = opened.read(HEAD_BYTES)
    except ObjectNotFoundError:
        message = f"{shown(url)}: no such file"
        raise UserError(message) from None
    except StorageError as error:
        message = f"cannot be read: {error}"
        raise UserError(message) from None
    parts = urlsplit(url)
    name = PurePosixPath(unquote(parts.path, errors="surrogateescape")).name
    if name in {"", ".", ".."}:
        name = parts.hostname or "file"
    kind = asset_kind(name) or ("image" if read_header(head) else "video")

    def download() -> BinaryIO:
        return _downloaded(url, kind)

    return SourceFile(path=escape_path(name).replace("/", "%2F"), kind=kind, open=download)


def _downloaded(url: str, kind: AssetKind) -> BinaryIO:
    """A temporary copy: FFmpeg seeks."""
    max_bytes = DecodeLimits().max_file_bytes if kind == "image" else MAX_DOWNLOAD_BYTES
    copy = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    try:
        with open_web(url) as opened:
            while chunk := opened.read(_COPY_BYTES):
                copy.write(chunk)
                if copy.tell() > max_bytes:
                    message = f"the file has more than {max_bytes} bytes"
                    raise InputError("too_large", message)
    except BaseException as error:
        copy.close()
        if isinstance(error, InputError) or not isinstance(error, Exception):
            raise
        raise InputError("fetch", _reason(error)) from error
    copy.seek(0)
    return copy


def _asset(file: SourceFile) -> Asset:
    return Asset(path=file.path, kind=file.kind, size_bytes=0, etag="")


@contextmanager
def _typed_errors() -> Iterator[None]:
    """What reading a file raises, as the file's own error."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError("out_of_memory", "no memory to decode it") from error
    except ObjectNotFoundError as error:
        raise InputError("not_found", str(error)) from error
    except ObjectForbiddenError as error:
        raise InputError("forbidden", str(error)) from error
    except (av.FFmpegError, cv2.error) as error:
        raise InputError("corrupt", _reason(error)) from error
    except (StorageError, OSError) as error:
        raise InputError("fetch", _reason(error)) from error


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


def _no_progress() -> None:
    """Nobody watches over this process."""
