"""What predictions are measured by: intersection over union, and the errors of metric depth.

Both accumulators are fed frame by frame, take a constant amount of memory, can be pickled, and can
be merged in any order: counts are integers, sums are float64 (equal up to their last digits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from segformer3d.labels import CLASS_NAMES, NUM_CLASSES

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEPTH_MIN_M: Final = 1e-3
DEPTH_MAX_M: Final = 80.0

_DELTA_BASE: Final = 1.25


class ConfusionMatrix:
    """Pixels counted by what they are and what they were taken for.

    Attributes:
        num_classes: K, the classes 0 to K - 1.
        counts: int64 (K, K + 1). Row: the class in the labels. Column: the prediction, mapped
            through the groups; the last column is for predictions of no class, which are misses.
    """

    def __init__(
        self, num_classes: int = NUM_CLASSES, groups: tuple[int, ...] | None = None
    ) -> None:
        """Start with no pixels.

        Args:
            num_classes: Number of classes, 1 to 255.
            groups: For each class the label that stands for it in this data set (CamVid counts
                walls as buildings); None if each class stands for itself.

        Raises:
            ValueError: `groups` has another length than `num_classes`, or that is out of range.
        """
        if not 1 <= num_classes <= 255:
            raise ValueError(f"num_classes must be 1 to 255, not {num_classes}")
        if groups is not None and len(groups) != num_classes:
            raise ValueError(f"groups must name a label for each of {num_classes} classes")
        self.num_classes = num_classes
        self.counts = np.zeros((num_classes, num_classes + 1), np.int64)
        mapped = np.arange(num_classes) if groups is None else np.asarray(groups)
        self._column = np.full(256, num_classes, np.int64)
        self._column[:num_classes] = np.where(
            (mapped >= 0) & (mapped < num_classes), mapped, num_classes
        )

    def update(self, predicted: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Count the pixels of one or more frames.

        Args:
            predicted: uint8 (...), train ids; anything from `num_classes` on is a miss.
            target: uint8, same shape; pixels from `num_classes` on (255) are not counted.

        Raises:
            ValueError: The shapes differ, or one is not uint8.
        """
        if predicted.shape != target.shape:
            raise ValueError(f"predicted {predicted.shape} and target {target.shape} differ")
        if predicted.dtype != np.uint8 or target.dtype != np.uint8:
            raise ValueError(f"uint8 expected, not {predicted.dtype} and {target.dtype}")
        known = target < self.num_classes
        cells = target[known].astype(np.int64) * (self.num_classes + 1)
        cells += self._column[predicted[known]]
        counted = np.bincount(cells, minlength=self.counts.size)
        self.counts += counted.reshape(self.counts.shape)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the pixels of another matrix.

        Raises:
            ValueError: It has another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge {other.num_classes} classes into {self.num_classes}")
        self.counts += other.counts

    def iou(self) -> NDArray[np.float64]:
        """Intersection over union, float64 (K,).

        NaN for a class that is neither in the labels nor in the predictions; 0 for one that is
        only predicted. (The Jaccard index, as in Everingham et al. 2015.)
        """
        hits = np.diagonal(self.counts).astype(np.float64)
        unions = self.counts.sum(axis=1) + self.counts[:, :-1].sum(axis=0) - hits
        nothing = np.full(self.num_classes, np.nan)
        return np.asarray(np.divide(hits, unions, out=nothing, where=unions > 0))

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that are in the labels; NaN without any.

        A class that is only predicted costs the classes it was mistaken for, not a zero of its
        own: the data set does not say how well it is recognised.
        """
        present = self.counts.sum(axis=1) > 0
        return float(self.iou()[present].mean()) if present.any() else float("nan")

    @property
    def pixel_accuracy(self) -> float:
        """Share of labelled pixels with the right class; NaN without any."""
        pixels = int(self.counts.sum())
        return int(np.trace(self.counts)) / pixels if pixels else float("nan")

    @property
    def pixels(self) -> int:
        """Number of labelled pixels."""
        return int(self.counts.sum())

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain JSON types, null where there is none."""
        names = CLASS_NAMES if self.num_classes == NUM_CLASSES else range(self.num_classes)
        ious = self.iou().tolist()
        return {
            "mean_iou": _number(self.mean_iou),
            "pixel_accuracy": _number(self.pixel_accuracy),
            "iou": {str(name): _number(value) for name, value in zip(names, ious, strict=True)},
            "pixels": self.pixels,
            "counts": self.counts.tolist(),
        }


class DepthErrors:
    """The errors of Eigen et al. 2014 (arXiv:1406.2283, section 4), pooled over all pixels.

    A pixel counts where the true depth is finite and between `min_m` and `max_m`, both excluded;
    the prediction is clipped to that range. Every pixel weighs the same, whatever its frame.
    A pixel without a valid prediction (not finite, zero or negative) is wrong for the deltas; the
    means of the errors are over the pixels with a prediction, so look at `missing` beside them.

    Attributes:
        min_m: Smallest depth in metres.
        max_m: Largest depth in metres.
        pixels: Number of pixels with a true depth and a prediction.
        missing: Number of pixels with a true depth and no valid prediction.
    """

    def __init__(self, min_m: float = DEPTH_MIN_M, max_m: float = DEPTH_MAX_M) -> None:
        """Start with no pixels.

        Raises:
            ValueError: Not 0 < `min_m` < `max_m`.
        """
        if not 0 < min_m < max_m:
            raise ValueError(f"0 < min_m < max_m is needed, not {min_m} and {max_m}")
        self.min_m = min_m
        self.max_m = max_m
        self.pixels = 0
        self.missing = 0
        # |p - t| / t, (p - t)^2 / t, (p - t)^2, (ln p - ln t)^2
        self._sums = np.zeros(4, np.float64)
        self._within = np.zeros(3, np.int64)

    def update(self, predicted: NDArray[np.float32], target: NDArray[np.float32]) -> None:
        """Add the pixels of one or more frames.

        Args:
            predicted: float32 (...), metres.
            target: float32, same shape, metres; 0 or NaN where unknown.

        Raises:
            ValueError: The shapes differ.
        """
        if predicted.shape != target.shape:
            raise ValueError(f"predicted {predicted.shape} and target {target.shape} differ")
        known = (target > self.min_m) & (target < self.max_m)
        found = np.isfinite(predicted) & (predicted > 0)
        self.missing += int(np.count_nonzero(known & ~found))
        known &= found
        true = target[known].astype(np.float64)
        guess = np.clip(predicted[known].astype(np.float64), self.min_m, self.max_m)
        squares = np.square(guess - true)
        logs = np.log(guess) - np.log(true)
        self.pixels += true.size
        self._sums += [
            np.sum(np.abs(guess - true) / true),
            np.sum(squares / true),
            np.sum(squares),
            np.sum(np.square(logs)),
        ]
        ratios = np.maximum(guess / true, true / guess)
        self._within += [np.count_nonzero(ratios < _DELTA_BASE**power) for power in (1, 2, 3)]

    def merge(self, other: DepthErrors) -> None:
        """Add the pixels of another accumulator.

        Raises:
            ValueError: It has another range of depths.
        """
        if (other.min_m, other.max_m) != (self.min_m, self.max_m):
            raise ValueError(f"cannot merge errors up to {other.max_m} m into {self.max_m} m")
        self.pixels += other.pixels
        self.missing += other.missing
        self._sums += other._sums
        self._within += other._within

    @property
    def abs_rel(self) -> float:
        """Mean of |p - t| / t."""
        return self._mean(0)

    @property
    def sq_rel(self) -> float:
        """Mean of (p - t)^2 / t, metres."""
        return self._mean(1)

    @property
    def rmse(self) -> float:
        """Root of the mean of (p - t)^2, metres."""
        return float(np.sqrt(self._mean(2)))

    @property
    def rmse_log(self) -> float:
        """Root of the mean of (ln p - ln t)^2."""
        return float(np.sqrt(self._mean(3)))

    @property
    def delta1(self) -> float:
        """Share of pixels with max(p / t, t / p) < 1.25."""
        return self._share(0)

    @property
    def delta2(self) -> float:
        """Share of pixels with max(p / t, t / p) < 1.25^2."""
        return self._share(1)

    @property
    def delta3(self) -> float:
        """Share of pixels with max(p / t, t / p) < 1.25^3."""
        return self._share(2)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain JSON types, null where there is none."""
        names = ("abs_rel", "sq_rel", "rmse", "rmse_log", "delta1", "delta2", "delta3")
        return {
            **{name: _number(getattr(self, name)) for name in names},
            "pixels": self.pixels,
            "missing": self.missing,
            "min_m": self.min_m,
            "max_m": self.max_m,
        }

    def _mean(self, index: int) -> float:
        return float(self._sums[index]) / self.pixels if self.pixels else float("nan")

    def _share(self, index: int) -> float:
        pixels = self.pixels + self.missing
        return int(self._within[index]) / pixels if pixels else float("nan")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
