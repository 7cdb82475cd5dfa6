"""Measuring a model on labelled frames: the frames are resized as jobs resize them.

Class ids are resolved at the size of the labels, and depth is resized from the H / 4 grid to the
size of the depth labels, so that every labelled pixel is compared with what a reader of a job's
output would see there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from segformer3d.config import METRIC_DEPTH
from segformer3d.datasets.sample import DatasetError
from segformer3d.draw import resize_depth
from segformer3d.geometry import FrameSizeError, Geometry, input_size, resize, short_side_of
from segformer3d.labels import CLASS_NAMES, NUM_CLASSES
from segformer3d.metrics import DEPTH_MAX_M, ConfusionMatrix, DepthErrors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from segformer3d.config import DepthCodec, WeightsInfo
    from segformer3d.datasets.sample import Sample, SampleSource
    from segformer3d.predictor import Predictions, Predictor

_DEPTH_COLUMNS = (
    ("AbsRel", "abs_rel"),
    ("SqRel m", "sq_rel"),
    ("RMSE m", "rmse"),
    ("RMSE log", "rmse_log"),
    ("d<1.25", "delta1"),
    ("d<1.25^2", "delta2"),
    ("d<1.25^3", "delta3"),
)


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        num_frames: Frames looked at.
        short_side_px: Their short side as the model saw them.
        classes: Of the segmentation; None if it could not be measured.
        depth: Of the metric depth; None likewise.
        notes: Why something is missing, one line each.
    """

    num_frames: int
    short_side_px: int
    classes: ConfusionMatrix | None
    depth: DepthErrors | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain JSON types."""
        return {
            "num_frames": self.num_frames,
            "short_side_px": self.short_side_px,
            "classes": None if self.classes is None else self.classes.to_dict(),
            "depth": None if self.depth is None else self.depth.to_dict(),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Tables for a person."""
        frames = "1 frame" if self.num_frames == 1 else f"{self.num_frames} frames"
        blocks = [f"{frames}, short side {self.short_side_px} px"]
        if self.classes is not None:
            blocks.append(_class_table(self.classes))
        if self.depth is not None:
            blocks.append(_depth_table(self.depth))
        return "\n\n".join([*blocks, *self.notes])


def evaluate(
    predictor: Predictor,
    source: SampleSource,
    *,
    info: WeightsInfo,
    short_side_px: int | None = None,
    depth_cap_m: float = DEPTH_MAX_M,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure weights on a data set.

    Depth without a unit, of the weights or of the data set, is left out, and a note says so.

    Args:
        predictor: The model.
        source: The data set.
        info: What belongs to the model's weights.
        short_side_px: Frames' short side for the model, rounded to a multiple of 32; by default
            that of the weights' training, or 512.
        depth_cap_m: Pixels farther than that are not measured.
        limit: Measure so many frames, spread evenly over the data set; by default all.
        progress: Called with the number of frames done.

    Raises:
        DatasetError: A sample cannot be read.
    """
    side = short_side_of(short_side_px or info.short_side_px)
    number = min(limit or len(source), len(source))
    indices = [place * len(source) // number for place in range(number)]
    classes, depth = measure(
        predictor,
        source,
        indices,
        side,
        depth_codec=info.depth_codec,
        depth_cap_m=depth_cap_m,
        progress=progress,
    )
    notes: list[str] = []
    if info.config.num_classes not in (None, NUM_CLASSES):
        classes = None
    if classes is None:
        notes.append(f"classes not measured: {_why_no_classes(info)}")
    if depth is None:
        notes.append(f"depth not measured: {_why_no_depth(info, source)}")
    return Evaluation(number, side, classes, depth, tuple(notes))


def measure(
    predictor: Predictor | Callable[..., Predictions],
    source: SampleSource,
    indices: Iterable[int],
    short_side_px: int,
    *,
    depth_codec: DepthCodec | None = METRIC_DEPTH,
    depth_cap_m: float = DEPTH_MAX_M,
    progress: Callable[[int], None] | None = None,
) -> tuple[ConfusionMatrix | None, DepthErrors | None]:
    """Measure some samples; the parts of several callers can be merged.

    Args:
        predictor: The model, or what answers like `Predictor.predict`.
        source: The data set.
        indices: Which samples; a rank of several gives `range(rank, len(source), world)`.
        short_side_px: Frames' short side for the model, rounded to a multiple of 32.
        depth_codec: How the model's depth codes read; what is not metric is not measured.
        depth_cap_m: Pixels farther than that are not measured.
        progress: Called with the number of frames done.

    Returns:
        Of the classes and of the depth; None where these samples or the model have none.

    Raises:
        DatasetError: A sample cannot be read, or is far longer than wide.
    """
    predict = predictor if callable(predictor) else predictor.predict
    classes = ConfusionMatrix(groups=tuple(source.groups))
    errors = DepthErrors(max_m=depth_cap_m)
    metric = depth_codec is not None and depth_codec.kind == source.depth_kind == "metric"
    codec = depth_codec if metric else None
    done = 0
    prepared = (_Prepared.of(source[index], short_side_px) for index in indices)
    for batch in _batches(prepared, getattr(predictor, "batch", 1)):
        frames = np.stack([item.frame for item in batch])
        said = predict(frames, class_ids_size=batch[0].labels_size)
        for place, item in enumerate(batch):
            sample = item.sample
            if sample.class_ids is not None and said.class_ids is not None:
                classes.update(said.class_ids[place], sample.class_ids)
            if sample.depth is not None and said.depth is not None and codec is not None:
                height, width = sample.depth.shape
                depth = resize_depth(codec.decode(said.depth[place]), (width, height))
                errors.update(depth, sample.depth)
        done += len(batch)
        if progress is not None:
            progress(done)
    return (
        classes if classes.pixels else None,
        errors if errors.pixels + errors.missing else None,
    )


def save_confusion_picture(matrix: ConfusionMatrix, path: Path) -> None:
    """Draw the classes of the labels against the predictions, in percent of each row.

    Args:
        matrix: Of the 19 classes.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    rows, columns, shares = _shares(matrix)
    names = (*CLASS_NAMES, "none")
    side = 2.5 + 0.42 * len(columns)
    figure = Figure(figsize=(side, 1.8 + 0.42 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), [names[column] for column in columns], rotation=60)
    axes.set_yticks(range(len(rows)), [names[row] for row in rows])
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    axes.set_title(f"percent of the labelled pixels; mean IoU {matrix.mean_iou:.3f}")
    for y, x in np.argwhere(shares >= 0.005).tolist():
        ink = "white" if shares[y, x] > 0.5 else "black"
        text = f"{100 * shares[y, x]:.0f}"
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=8)
    figure.savefig(path)


@dataclass(frozen=True)
class _Prepared:
    """A sample, and its frame as the model sees it."""

    sample: Sample
    frame: NDArray[np.uint8]
    labels_size: tuple[int, int] | None

    @classmethod
    def of(cls, sample: Sample, short_side_px: int) -> _Prepared:
        height, width = sample.image.shape[:2]
        geometry = Geometry(short_side_px=short_side_of(short_side_px))
        try:
            size = input_size(width, height, geometry)
        except FrameSizeError as error:
            raise DatasetError(f"{sample.name}: {error}") from None
        labels = sample.class_ids
        labels_size = None if labels is None else (labels.shape[0], labels.shape[1])
        return cls(sample, resize(sample.image, size), labels_size)


def _batches(items: Iterator[_Prepared], size: int) -> Iterator[Sequence[_Prepared]]:
    """Gather neighbours of one frame size and one label size."""
    for _, alike in groupby(items, key=lambda item: (item.frame.shape, item.labels_size)):
        while batch := list(islice(alike, size)):
            yield batch


def _shares(matrix: ConfusionMatrix) -> tuple[list[int], list[int], NDArray[np.float64]]:
    """Rows and columns that hold pixels, and each row's shares."""
    totals = matrix.counts.sum(axis=1)
    rows = np.flatnonzero(totals)
    columns = np.flatnonzero((matrix.counts.sum(axis=0) > 0) | np.append(totals > 0, False))
    shares = matrix.counts[np.ix_(rows, columns)] / totals[rows][:, None]
    return rows.tolist(), columns.tolist(), shares


def _class_table(matrix: ConfusionMatrix) -> str:
    totals = matrix.counts.sum(axis=1)
    lines = [
        f"{'mean IoU':<16}{_cell(matrix.mean_iou)}",
        f"{'pixel accuracy':<16}{_cell(matrix.pixel_accuracy)}",
        "",
        f"{'class':<16}{'IoU':>9}{'of pixels':>11}",
    ]
    for name, iou, total in zip(CLASS_NAMES, matrix.iou(), totals, strict=True):
        # Only predicted, a class has no IoU that counts; neither, it is not in this data set.
        if total:
            lines.append(f"{name:<16}{_cell(iou)}{total / totals.sum():>10.2%}")
    return "\n".join(lines)


def _depth_table(errors: DepthErrors) -> str:
    head = "".join(f"{title:>9}" for title, _ in _DEPTH_COLUMNS)
    values = "".join(_cell(getattr(errors, name)) for _, name in _DEPTH_COLUMNS)
    lines = [f"depth from {errors.min_m:g} to {errors.max_m:g} m, over all pixels", head, values]
    if errors.missing:
        share = errors.missing / (errors.missing + errors.pixels)
        lines.append(f"{share:.2%} of the pixels got no depth: wrong for d, not in the rest")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{'-':>9}" if np.isnan(value) else f"{value:>9.4f}"


def _why_no_classes(info: WeightsInfo) -> str:
    if info.config.num_classes is None:
        return "the weights have no segmentation head"
    if info.config.num_classes != NUM_CLASSES:
        return f"the weights know {info.config.num_classes} classes, not Cityscapes' {NUM_CLASSES}"
    return "the frames have no class labels"


def _why_no_depth(info: WeightsInfo, source: SampleSource) -> str:
    if info.depth_codec is None:
        return "the weights have no depth head"
    if info.depth_codec.kind == "relative":
        return "the weights' depth is relative, and errors in metres make no sense of it"
    if source.depth_kind == "relative":
        return "the data set's depth is relative, and errors in metres make no sense of it"
    return "the frames have no depth"
