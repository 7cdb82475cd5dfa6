"""Pictures on disk: their names, whole-or-nothing files, and H.264 that keeps a source's times."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from jobs.footage import Found, SourceFile
from pipeline.errors import InputError, JobError, UserError
from pipeline.records import AssetKind, UInt8Array
from pipeline.storage import split_glob
from segformer3d.files import temporary_beside

if TYPE_CHECKING:
    from av.video.stream import VideoStream

SUFFIXES: dict[AssetKind, str] = {"image": ".png", "video": ".mp4"}
# Of a video whose only frame says nothing of a rate.
_DEFAULT_RATE = Fraction(25)
_LEAST_RATE = Fraction(1, 1001)
_CRF = "20"
_MAX_SHOWN_CHARS = 200
# Of file systems.
_NAME_MAX_BYTES = 255
# FFmpeg's MP4: ticks between two frames, and the least ticks per second that it makes them of.
_MAX_GAP_TICKS = 2**31 - 2
_LEAST_TICKS_PER_S = 10_000


def output_paths(found: Found, url: str, output: str | None, name: str) -> list[Path]:
    """Where each file's picture goes.

    Args:
        found: The files.
        url: What the user named.
        output: Folder or file that the user wants; None is the working folder, or a folder of its
            own in there if several files were named.
        name: What the pictures are called: ``NAME_name.png``.

    Raises:
        UserError: If it is no place for them, such as one of the files themselves.
    """
    folder = output_folder(url, output, name, is_file=found.is_file)
    if not found.is_file:
        return [folder / relative for relative in _relative_paths(found.files, name)]
    (file,) = found.files
    if output is not None and _is_file_name(output):
        path = folder
        if path.suffix.lower() != SUFFIXES[file.kind]:
            message = f"--output {output}: name a folder or a {SUFFIXES[file.kind]} file"
            raise UserError(message)
    else:
        path = folder / _picture_name(PurePosixPath(file.path).stem, name, file.kind)
    if file.local_path is not None and _is_same_file(path, file.local_path):
        message = f"--output {path}: this is the input"
        raise UserError(message)
    return [path]


def output_folder(url: str, output: str | None, name: str, *, is_file: bool) -> Path:
    """The folder of ``output_paths``; see there."""
    if output is not None:
        return local_path(output)
    if is_file:
        return Path()
    root, _ = split_glob(url)
    place = PurePosixPath(root) if "://" in root else Path(root).expanduser().absolute()
    place = PurePosixPath(os.path.normpath(place))
    return Path(f"{place.name or 'files'}_{name}")


def local_path(output: str) -> Path:
    """The path that ``--output`` names.

    Raises:
        UserError: If no file system can have it.
    """
    if "://" in output:
        message = f"--output {output}: name a local folder or file"
        raise UserError(message)
    try:
        path = Path(output).expanduser()
        path.is_dir()  # complains of a name that is too long
    except RuntimeError:
        message = f"--output {output}: no such user"
        raise UserError(message) from None
    except OSError as error:
        message = f"--output: cannot use {output[:_MAX_SHOWN_CHARS]}: {error.strerror}"
        raise UserError(message) from None
    return path


@contextmanager
def new_file(path: Path, keep: Callable[[], bool] = lambda: True) -> Iterator[Path]:
    """A temporary name beside ``path``, which takes its place whole or not at all.

    Raises:
        UserError: If it or its folder cannot be made.
        JobError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--output: cannot make the folder {path.parent}: {error.strerror}"
        raise UserError(message) from error
    try:
        temporary = temporary_beside(path)
    except OSError as error:
        message = f"--output: {path} cannot be made: {error.strerror}"
        raise UserError(message) from error
    try:
        yield temporary
        if keep():
            temporary.replace(path)
    except (OSError, av.FFmpegError) as error:
        message = f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}"
        raise JobError(message) from error
    finally:
        # The first error is the one to tell of.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class VideoWriter:
    """An H.264 MP4 whose frames keep the times of another video's; a context manager."""

    def __init__(
        self, path: Path, size: tuple[int, int], pts: Sequence[int], time_base: Fraction
    ) -> None:
        """Open the file.

        Args:
            path: Where it goes.
            size: Width and height in pixels, both even.
            pts: When each frame is shown, in ticks, sorted.
            time_base: Seconds per tick.

        Raises:
            InputError: If two frames are further apart than an MP4 can say.
        """
        self._pts = _rising(pts)
        self._durations = _durations(self._pts, time_base)
        _check_gaps(self._durations.values(), time_base)
        self._time_base = time_base
        self._written = 0
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        rate = _rate(self._pts, time_base)
        self._stream: VideoStream = self._container.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = time_base
        # What libswscale makes of RGB, said in the file: players would guess, by its size.
        self._stream.codec_context.colorspace = Colorspace.ITU601
        self._stream.codec_context.color_range = ColorRange.MPEG
        self._stream.codec_context.color_primaries = ColorPrimaries.BT709
        self._stream.codec_context.color_trc = ColorTrc.BT709
        # With B-frames and a variable rate, the container's length would be that of the decoding
        # times, not of the times shown.
        self._stream.options = {"crf": _CRF, "preset": "veryfast", "bf": "0"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        with self._container:
            if exc_type is None:
                self._encode(None)

    def write(self, picture: UInt8Array) -> None:
        """Append the next frame, uint8 ``(H, W, 3)`` RGB."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
        frame.pts, frame.time_base = self._pts[self._written], self._time_base
        self._written += 1
        self._encode(frame)

    def _encode(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            # The last frame would have no length otherwise, and the video would be shorter.
            packet.duration = self._durations.get(packet.pts or 0, 1)
            self._container.mux(packet)


def _rising(pts: Sequence[int]) -> list[int]:
    """Ticks from 0 that rise strictly, as a container demands."""
    rising: list[int] = []
    for tick in pts:
        rising.append(max(tick - pts[0], rising[-1] + 1 if rising else 0))
    return rising


def _durations(pts: Sequence[int], time_base: Fraction) -> dict[int, int]:
    last = max(1, round(1 / (_rate(pts, time_base) * time_base)))
    durations = {first: second - first for first, second in pairwise(pts)}
    return durations | {pts[-1]: last}


def _check_gaps(durations: Iterable[int], time_base: Fraction) -> None:
    ticks_per_s = time_base.denominator
    while ticks_per_s < _LEAST_TICKS_PER_S:
        ticks_per_s *= 2
    gap_s = max(durations) * time_base
    if gap_s * ticks_per_s > _MAX_GAP_TICKS:
        message = f"two frames are {float(gap_s):.0f} s apart, which no MP4 of such ticks can say"
        raise InputError("unsupported", message)


def _rate(pts: Sequence[int], time_base: Fraction) -> Fraction:
    """Frames per second on average."""
    if len(pts) < 2:
        return _DEFAULT_RATE
    rate = (len(pts) - 1) / ((pts[-1] - pts[0]) * time_base)
    return max(rate.limit_denominator(1001), _LEAST_RATE)


def _relative_paths(files: Sequence[SourceFile], name: str) -> Iterator[PurePosixPath]:
    """The files' own paths with new names; in full where two names would be one."""
    paths = [PurePosixPath(file.path) for file in files]
    stems = Counter(
        (path.with_suffix(""), file.kind) for path, file in zip(paths, files, strict=True)
    )
    taken = set(paths)
    for path, file in zip(paths, files, strict=True):
        stem = path.with_suffix("")
        alone = stems[stem, file.kind] == 1 and stem not in taken
        yield path.with_name(_picture_name(path.stem if alone else path.name, name, file.kind))


def _picture_name(stem: str, name: str, kind: AssetKind) -> str:
    """A file name; what is too long for a file system is cut, and told apart by its hash."""
    tail = f"_{name}{SUFFIXES[kind]}"
    room = _NAME_MAX_BYTES - len(tail)
    data = os.fsencode(stem)
    if len(data) > room:
        digest = f"~{hashlib.sha256(data).hexdigest()[:8]}"
        stem = data[: room - len(digest)].decode(errors="ignore") + digest
    return stem + tail


def _is_file_name(output: str) -> bool:
    path = local_path(output)
    return bool(path.suffix) and not output.endswith("/") and not path.is_dir()


def _is_same_file(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False
