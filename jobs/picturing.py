"""What ``predict`` and ``attention`` share: the model, and the run over files that draws pictures.

An image gives a PNG, a video an H.264 MP4 with every frame at its own time. A file that cannot be
read is told of and the others go on, as in a job.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.claim import load_weights
from jobs.footage import Footage, Frame, SourceFile, find_files, open_footage
from jobs.picture_files import VideoWriter, new_file, output_folder, output_paths
from jobs.progress import Progress, say
from jobs.spec import JobSpec, check_spec
from pipeline.encode import encode_png
from pipeline.errors import ErrorKind, InputError, UserError
from pipeline.geometry import Geometry
from pipeline.records import AssetKind, UInt8Array
from pipeline.sources.assets import DecodeLimits
from pipeline.urls import shown
from segformer3d.draw import message_picture

if TYPE_CHECKING:
    from segformer3d.config import WeightsInfo
    from segformer3d.model import Segformer3D
    from segformer3d.predictor import Predictor

_UNREADABLE = "this frame cannot be read"


@dataclass(frozen=True)
class Model:
    """A model ready to run.

    Attributes:
        network: The network; the predictor has taken it over.
        info: What its weights file says of it.
        predictor: The inference path of the jobs.
    """

    network: "Segformer3D"
    info: "WeightsInfo"
    predictor: "Predictor"


@dataclass(frozen=True, kw_only=True)
class Painted:
    """What a painter makes of one frame.

    Attributes:
        picture: uint8 ``(H, W, 3)`` RGB, both sides even; None if there is an error.
        values: What was measured, in plain JSON types.
        error_kind: Set if the model could not say anything of the frame.
        error: The message that goes with it.
    """

    picture: UInt8Array | None = None
    values: dict[str, Any] = field(default_factory=dict)
    error_kind: ErrorKind | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """What a user asks for.

    Attributes:
        url: A file, a folder or a glob, local or ``s3://``; or a file on the web.
        output: Local folder or file for the pictures; None is the working folder, or one of its
            own in there where several files were named.
        weights: URL of a weights file; None is what a job takes without one.
        short_side_px: Short side of the model's input; None is a job's.
        device: Where to run, as torch names it; None is the GPU if there is one.
        endpoint_url: S3 endpoint.
    """

    url: str
    output: str | None = None
    weights: str | None = None
    short_side_px: int | None = None
    device: str | None = None
    endpoint_url: str | None = None

    def spec(self) -> JobSpec:
        """The spec of a job that would see the files just so, with a job's defaults and checks.

        Raises:
            UserError: If a value is out of its bounds.
        """
        size = {} if self.short_side_px is None else {"short_side_px": self.short_side_px}
        fields = {
            "input": {"url": self.url, "storage": {"endpoint_url": self.endpoint_url}},
            "output": {"url": "."},
            "geometry": size,
            "model": {"weights": self.weights},
        }
        return check_spec(fields, "the options")


class Painter(ABC):
    """Draws pictures of one file's frames; one size of frame gives one size of picture.

    Attributes:
        batch: Frames to hand over at a time.
    """

    batch: int = 1

    @abstractmethod
    def paint(self, frames: Sequence[UInt8Array]) -> list[Painted]:
        """Draw frames of one size.

        Args:
            frames: uint8 ``(H, W, 3)`` RGB each, upright, at the file's own size.

        Raises:
            InputError: If frames of that size cannot be handled at all.
        """

    @abstractmethod
    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the pictures of frames of that size."""


NewPainter = Callable[[], Painter]


@dataclass(frozen=True, kw_only=True)
class FrameReport:
    """What became of one frame; ``pts_s`` counts seconds from the source's own zero."""

    frame_index: int
    pts_s: float | None
    values: dict[str, Any]
    error_kind: ErrorKind | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What became of one file.

    Attributes:
        file: Its path relative to what was named.
        kind: Image or video.
        width: Width of its upright frames in pixels; 0 if it could not be opened.
        height: Height, likewise.
        output: The picture or video that was written; None if none could be.
        frames: Every frame.
        error_kind: Set if something of the file could not be read.
        error: The message that goes with it.
    """

    file: str
    kind: AssetKind
    width: int = 0
    height: int = 0
    output: str | None = None
    frames: tuple[FrameReport, ...] = ()
    error_kind: ErrorKind | None = None
    error: str | None = None

    @property
    def num_errors(self) -> int:
        """Frames that could not be had."""
        return sum(frame.error_kind is not None for frame in self.frames)


def picture_all(
    request: PictureRequest, name: str, new_painters: Callable[[Model, Geometry], NewPainter]
) -> list[FileReport]:
    """Find the files, load the model, and draw every file; tells of those that cannot be read.

    Args:
        request: What the user asks for.
        name: What the pictures are called: ``FILE_name.png``.
        new_painters: Gives, for a model and a job's geometry, what makes a painter for each file.

    Returns:
        One report per file, sorted by path.

    Raises:
        UserError: If the request cannot be carried out as it stands.
        JobError: If a picture cannot be written.
        StorageError: If a store cannot be listed.
    """
    spec = request.spec()
    folder = output_folder(request.url, request.output, name, is_file=False)
    found = find_files(
        request.url, spec.input.storage.options(), skip=Path(os.path.realpath(folder))
    )
    outputs = output_paths(found, request.url, request.output, name)
    model = open_model(spec, request.device)
    geometry = spec.sized_for(model.info.short_side_px).geometry.geometry()
    new_painter = new_painters(model, geometry)
    limits = spec.limits.limits()
    reports = []
    with _files_progress(len(outputs)) as advance:
        for file, output in zip(found.files, outputs, strict=True):
            try:
                report = _picture_file(file, output, new_painter(), limits)
            except UserError as error:
                if len(outputs) == 1:
                    raise
                # What was asked for suits other files.
                report = FileReport(
                    file=file.path, kind=file.kind, error_kind="unsupported", error=str(error)
                )
            if report.error is not None:
                say(f"{report.file}: {report.error_kind}: {report.error}")
            reports.append(report)
            advance()
    return reports


def open_model(spec: JobSpec, device: str | None) -> Model:
    """Load the weights that a job of that spec would use.

    Raises:
        UserError: If they cannot be had, or there is no such device.
    """
    from segformer3d.predictor import Predictor
    from segformer3d.weights import model_from_bytes
    from segformer3d.weights_file import WeightsError

    _check_device(device)
    try:
        network, info = model_from_bytes(load_weights(spec))
    except WeightsError as error:
        message = f"weights {shown(str(spec.model.weights))}: {error}"
        raise UserError(message) from None
    if not info.trained:
        say("The weights are untrained: the pictures show that everything runs, not a street.")
    return Model(network=network, info=info, predictor=Predictor(network, info, device=device))


@contextmanager
def typed_memory_errors(size: tuple[int, int]) -> Iterator[None]:
    """Memory that runs out under a model, as the error of the file whose frames it was given.

    Args:
        size: Width and height of the frames as the model sees them.

    Raises:
        InputError: ``out_of_memory``.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"the model does not fit into memory with frames of {size[0]}x{size[1]}"
        raise InputError("out_of_memory", message) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; of a CPU's, torch says so in the message only."""
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError | MemoryError) or "can't allocate memory" in str(
        error
    )


def _picture_file(
    file: SourceFile, output: Path, painter: Painter, limits: DecodeLimits
) -> FileReport:
    try:
        with open_footage(file, limits) as footage:
            return _picture_footage(file, footage, output, painter)
    except InputError as error:
        return FileReport(
            file=file.path, kind=file.kind, error_kind=error.kind, error=error.message
        )


def _picture_footage(
    file: SourceFile, footage: Footage, output: Path, painter: Painter
) -> FileReport:
    report = FileReport(
        file=file.path, kind=footage.kind, width=footage.width, height=footage.height
    )
    if not footage.num_frames:
        raise InputError(footage.missing_kind or "truncated", footage.missing_error or "no frames")
    draw = _picture_image if footage.kind == "image" else _picture_video
    frames = draw(file, footage, output, painter)
    bad = [frame for frame in frames if frame.error_kind is not None]
    report = replace(report, frames=tuple(frames))
    if len(bad) < len(frames):
        report = replace(report, output=str(output))
    if footage.num_missing:
        return replace(report, error_kind=footage.missing_kind, error=footage.missing_error)
    if bad:
        head = f"{len(bad)} of {len(frames)} frames: " if footage.kind == "video" else ""
        return replace(report, error_kind=bad[0].error_kind, error=f"{head}{bad[0].error}")
    return report


def _picture_image(
    _file: SourceFile, footage: Footage, output: Path, painter: Painter
) -> list[FrameReport]:
    ((frame, painted),) = _painted(footage, painter)
    if painted.picture is not None:
        with new_file(output) as temporary:
            temporary.write_bytes(encode_png(painted.picture))
    return [_frame_report(frame, painted, footage)]


def _picture_video(
    file: SourceFile, footage: Footage, output: Path, painter: Painter
) -> list[FrameReport]:
    size = painter.picture_size(footage.width, footage.height)
    unreadable = message_picture(*size, _UNREADABLE)
    frames: list[FrameReport] = []
    with (
        new_file(output, keep=lambda: any(frame.error_kind is None for frame in frames)) as path,
        VideoWriter(path, size, footage.pts, footage.time_base) as writer,
        Progress(file.path, footage.num_frames) as progress,
    ):
        for frame, painted in _painted(footage, painter):
            writer.write(unreadable if painted.picture is None else painted.picture)
            frames.append(_frame_report(frame, painted, footage))
            progress.advance(1)
    return frames


def _painted(footage: Footage, painter: Painter) -> Iterator[tuple[Frame, Painted]]:
    """Every frame with its picture, in order; good frames go to the painter in batches."""
    waiting: list[Frame] = []
    for frame in footage.frames:
        waiting.append(frame)
        if len(waiting) >= painter.batch:
            yield from _paint(waiting, painter)
            waiting.clear()
    yield from _paint(waiting, painter)


def _paint(frames: Sequence[Frame], painter: Painter) -> Iterator[tuple[Frame, Painted]]:
    pixels = [frame.pixels for frame in frames if frame.pixels is not None]
    painted = iter(painter.paint(pixels) if pixels else ())
    for frame in frames:
        if frame.pixels is None:
            yield frame, Painted(error_kind=frame.error_kind, error=frame.error)
        else:
            yield frame, next(painted)


def _frame_report(frame: Frame, painted: Painted, footage: Footage) -> FrameReport:
    is_video = footage.kind == "video"
    return FrameReport(
        frame_index=frame.index,
        pts_s=float(footage.pts[frame.index] * footage.time_base) if is_video else None,
        values=painted.values,
        error_kind=painted.error_kind,
        error=painted.error,
    )


@contextmanager
def _files_progress(num_files: int) -> Iterator[Callable[[], None]]:
    if num_files == 1:
        yield lambda: None
        return
    with Progress("pictures", num_files, unit="files") as progress:
        yield lambda: progress.advance(1)


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(1, device=device).cpu()  # the meta device gives nothing back
    except (RuntimeError, AssertionError, NotImplementedError):
        message = f"--device {device}: there is no such device here"
        raise UserError(message) from None
