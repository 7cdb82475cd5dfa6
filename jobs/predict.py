"""The verb ``predict``: three-panel pictures and their numbers, by the `Predictor` of the jobs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from jobs.picturing import (
    FileReport,
    Model,
    NewPainter,
    Painted,
    Painter,
    PictureRequest,
    picture_all,
    typed_memory_errors,
)
from pipeline.encode import resize_class_ids
from pipeline.geometry import Geometry, input_size, resize
from pipeline.records import FrameStatistics, UInt8Array
from pipeline.statistics import certainty_of, frame_statistics
from segformer3d.draw import relative_span, three_panels
from segformer3d.labels import CLASSES

# Three of them side by side are as wide as hardware decoders of H.264 go (4096).
MAX_PANEL_PX = 1280


def predict(request: PictureRequest) -> list[FileReport]:
    """Draw frame, segmentation and depth of every image and video; see ``picture_all``."""

    def new_painters(model: Model, geometry: Geometry) -> NewPainter:
        return partial(PanelPainter, model, geometry)

    return picture_all(request, "panels", new_painters)


class PanelPainter(Painter):
    """Three panels per frame: frame, segmentation with its legend, depth with its scale."""

    def __init__(self, model: Model, geometry: Geometry) -> None:
        self.batch = model.predictor.batch
        self._predictor = model.predictor
        self._codec = model.info.depth_codec
        self._geometry = geometry
        # Relative depth takes the range of the file's first frame, so that colours hold still.
        self._span: tuple[float, float] | None = None

    def paint(self, frames: Sequence[UInt8Array]) -> list[Painted]:
        """As in ``Painter``; class ids and statistics are those of a job."""
        height, width = frames[0].shape[:2]
        size = input_size(width, height, self._geometry)
        with typed_memory_errors(size):
            said = self._predictor.predict(np.stack([resize(frame, size) for frame in frames]))
        painted = []
        for place, frame in enumerate(frames):
            if not said.finite[place]:
                error = "the model's output is not finite"
                painted.append(Painted(error_kind="non_finite", error=error))
                continue
            class_ids = None if said.class_ids is None else said.class_ids[place]
            codes = None if said.depth is None else said.depth[place]
            depth = None
            if codes is not None and self._codec is not None:
                depth = self._codec.decode(codes)
            values = statistics_fields(
                frame_statistics(certainty_of(said, place), class_ids, codes, self._codec)
            )
            picture = self._draw(frame, class_ids, depth)
            painted.append(Painted(picture=picture, values=values))
        return painted

    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """As in ``Painter``."""
        panel = panel_size(width, height)
        empty = np.zeros((panel[1], panel[0], 3), np.uint8)
        picture = three_panels(empty, None, None)
        return picture.shape[1], picture.shape[0]

    def _draw(
        self, frame: UInt8Array, class_ids: UInt8Array | None, depth: Any | None
    ) -> UInt8Array:
        size = panel_size(frame.shape[1], frame.shape[0])
        relative = self._codec is not None and self._codec.kind == "relative"
        if relative and self._span is None and depth is not None:
            self._span = relative_span(depth)
        return three_panels(
            resize(frame, size),
            None if class_ids is None else resize_class_ids(class_ids, size),
            depth,
            relative=relative,
            span=self._span,
        )


def panel_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of one panel: the frame's own, if it is not too large, and even."""
    scale = min(1.0, MAX_PANEL_PX / max(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def statistics_fields(statistics: FrameStatistics) -> dict[str, Any]:
    """Statistics of a frame as plain JSON types, class fractions by name of the class."""
    fields = asdict(statistics)
    fraction = statistics.class_fraction
    if fraction is not None:
        names = (item.name for item in CLASSES)
        fields["class_fraction"] = dict(zip(names, fraction, strict=True))
    return fields


def report_fields(report: FileReport) -> dict[str, Any]:
    """A file's report as plain JSON types.

    The statistics of a video are the means of its frames', which stand under ``frames``.
    """
    good = [frame.values for frame in report.frames if frame.error_kind is None]
    fields: dict[str, Any] = {
        "file": report.file,
        "kind": report.kind,
        "width": report.width,
        "height": report.height,
        "num_frames": len(report.frames),
        "num_errors": report.num_errors,
        "output": report.output,
        "error_kind": report.error_kind,
        "error": report.error,
    }
    fields |= _means(good) if good else statistics_fields(FrameStatistics())
    if report.kind == "video":
        fields["frames"] = [
            {
                "frame_index": frame.frame_index,
                "pts_s": frame.pts_s,
                "error_kind": frame.error_kind,
                "error": frame.error,
                **(frame.values or statistics_fields(FrameStatistics())),
            }
            for frame in report.frames
        ]
    return fields


def _means(frames: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = frames[0]["class_fraction"]
    means: dict[str, Any] = {
        name: _mean(frame[name] for frame in frames)
        for name in frames[0]
        if name != "class_fraction"
    }
    fraction = None
    if first is not None:
        fraction = {
            name: _mean(frame["class_fraction"][name] for frame in frames) for name in first
        }
    return {"class_fraction": fraction} | means


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
