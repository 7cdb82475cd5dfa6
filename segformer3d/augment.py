"""Random crops and colours of labelled frames; image, classes and depth stay aligned.

Zooming in makes things look nearer, so depth is divided by the zoom relative to the frames' short
side in training (as Eigen et al. 2014, arXiv 1406.2283, section 4.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from segformer3d.datasets import Sample
from segformer3d.labels import IGNORE_ID

if TYPE_CHECKING:
    from numpy.typing import NDArray

GREY = (124, 116, 104)  # the mean of ImageNet: zero to the network
STRETCH_MAX = 1.0
COARSE_STRIDE = 4  # rare classes are looked for on every fourth pixel


@dataclass(frozen=True)
class Augmentation:
    """How much samples are varied; the defaults vary nothing but the crop's place.

    Attributes:
        scale: Smallest and largest zoom, log-uniform; 1 is the training's short side.
        stretch: Largest relative change of the aspect ratio.
        flip: Probability of mirroring.
        colour: Strength of changes of brightness, contrast, gamma, saturation and white balance.
        blur: Probability of a slight blur.
        focus: Probability that a crop is laid around a pixel of a rare class.
        rescale_depth: Whether zooming divides the depth; not for depth without a unit.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    stretch: float = 0.0
    flip: float = 0.0
    colour: float = 0.0
    blur: float = 0.0
    focus: float = 0.0
    rescale_depth: bool = True

    def __post_init__(self) -> None:
        least, most = self.scale
        if not 0 < least <= most < math.inf:
            raise ValueError(f"scale must be two rising positive numbers, not {self.scale}")
        for name in ("flip", "blur", "focus", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, not {getattr(self, name)}")
        if not 0 <= self.stretch <= STRETCH_MAX:
            raise ValueError(f"stretch must be 0 to {STRETCH_MAX}, not {self.stretch}")


def augment(
    sample: Sample,
    rng: np.random.Generator,
    options: Augmentation,
    *,
    short_side_px: int,
    crop_px: tuple[int, int],
) -> Sample:
    """Cut one random crop out of a sample.

    Args:
        sample: The whole frame.
        rng: Where chance comes from.
        options: How much to vary.
        short_side_px: The frame's short side at zoom 1.
        crop_px: Height and width of the result; what reaches beyond the frame is grey, unlabelled
            and without depth.

    Returns:
        The crop; what the sample lacks it lacks too.
    """
    zoom = float(np.exp(rng.uniform(*np.log(options.scale))))
    stretch = float(np.exp(rng.uniform(-options.stretch, options.stretch)))
    scale = zoom * short_side_px / min(sample.image.shape[:2])
    scale_yx = (scale / np.sqrt(stretch), scale * np.sqrt(stretch))
    window = (
        max(1, round(crop_px[0] / scale_yx[0])),
        max(1, round(crop_px[1] / scale_yx[1])),
    )
    top, left = _corner(sample, rng, options, window)
    crop = _crop(sample, (top, left), window, crop_px)
    depth = crop.depth
    if depth is not None and options.rescale_depth:
        depth = depth / np.float32(zoom)
    cropped = Sample(sample.name, _recolour(crop.image, rng, options), crop.class_ids, depth)
    return _mirrored(cropped) if rng.random() < options.flip else cropped


def resized(sample: Sample, size_px: tuple[int, int]) -> Sample:
    """Resize a whole sample as it is, for measuring.

    Args:
        sample: The whole frame.
        size_px: Height and width.
    """
    whole = (sample.image.shape[0], sample.image.shape[1])
    return _crop(sample, (0, 0), whole, size_px)


def _corner(
    sample: Sample,
    rng: np.random.Generator,
    options: Augmentation,
    window: tuple[int, int],
) -> tuple[int, int]:
    """Choose the window's top left corner; windows larger than the frame overlap all of it."""
    height, width = sample.image.shape[:2]
    room_y, room_x = height - window[0], width - window[1]
    top = int(rng.integers(min(room_y, 0), max(room_y, 0) + 1))
    left = int(rng.integers(min(room_x, 0), max(room_x, 0) + 1))
    if sample.class_ids is None or rng.random() >= options.focus:
        return top, left
    row, column = _rare_pixel(sample.class_ids, rng)
    top = int(np.clip(row - rng.integers(window[0]), min(room_y, 0), max(room_y, 0)))
    left = int(np.clip(column - rng.integers(window[1]), min(room_x, 0), max(room_x, 0)))
    return top, left


def _rare_pixel(class_ids: NDArray[np.uint8], rng: np.random.Generator) -> tuple[int, int]:
    """Pick a pixel of a class drawn from those present, whatever its area."""
    coarse = class_ids[::COARSE_STRIDE, ::COARSE_STRIDE]
    present = np.flatnonzero(np.bincount(coarse.ravel(), minlength=IGNORE_ID)[:IGNORE_ID])
    if len(present) == 0:
        return class_ids.shape[0] // 2, class_ids.shape[1] // 2
    pixels = np.flatnonzero(coarse.ravel() == rng.choice(present))
    row, column = divmod(int(rng.choice(pixels)), coarse.shape[1])
    return COARSE_STRIDE * row, COARSE_STRIDE * column


def _crop(
    sample: Sample,
    corner: tuple[int, int],
    window: tuple[int, int],
    crop_px: tuple[int, int],
) -> Sample:
    def cut(
        plane: NDArray[np.generic], fill: int | tuple[int, ...], method: int
    ) -> NDArray[np.generic]:
        return _cut(plane, corner, window, crop_px, fill, method)

    smooth = cv2.INTER_AREA if window[0] > crop_px[0] else cv2.INTER_LINEAR
    nearest = cv2.INTER_NEAREST_EXACT
    ids = sample.class_ids
    depth = sample.depth
    return Sample(
        sample.name,
        np.asarray(cut(sample.image, GREY, smooth), np.uint8),
        None if ids is None else np.asarray(cut(ids, IGNORE_ID, nearest), np.uint8),
        None if depth is None else np.asarray(cut(depth, 0, nearest), np.float32),
    )


def _cut(
    plane: NDArray[np.generic],
    corner: tuple[int, int],
    window: tuple[int, int],
    crop_px: tuple[int, int],
    fill: int | tuple[int, ...],
    method: int,
) -> NDArray[np.generic]:
    """Cut a window that may reach beyond the plane, and resize it."""
    (top, left), (height, width) = corner, window
    inner = plane[max(top, 0) : top + height, max(left, 0) : left + width]
    above, before = max(-top, 0), max(-left, 0)
    below, after = height - inner.shape[0] - above, width - inner.shape[1] - before
    if above or below or before or after:
        sides = (above, below, before, after)
        inner = cv2.copyMakeBorder(inner, *sides, cv2.BORDER_CONSTANT, value=fill)
    return np.asarray(cv2.resize(inner, crop_px[::-1], interpolation=method))


def _recolour(
    image: NDArray[np.uint8], rng: np.random.Generator, options: Augmentation
) -> NDArray[np.uint8]:
    if options.blur and rng.random() < options.blur:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.5))), np.uint8)
    if not options.colour:
        return image
    strength = options.colour
    saturation = float(np.clip(1 + strength * rng.uniform(-1, 1), 0, 2))
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    image = np.asarray(cv2.addWeighted(image, saturation, grey, 1 - saturation, 0), np.uint8)
    values = np.linspace(0, 1, 256)[:, None] ** np.exp(0.6 * strength * rng.uniform(-1, 1))
    gain = np.exp(0.6 * strength * rng.uniform(-1, 1)) * np.exp(
        0.2 * strength * rng.uniform(-1, 1, 3)
    )
    contrast = np.exp(0.6 * strength * rng.uniform(-1, 1))
    curve = ((values - 0.5) * contrast + 0.5) * gain
    table = np.clip(255 * curve, 0, 255).astype(np.uint8)[None]
    return np.asarray(cv2.LUT(image, table), np.uint8)


def _mirrored(sample: Sample) -> Sample:
    ids, depth = sample.class_ids, sample.depth
    return Sample(
        sample.name,
        np.ascontiguousarray(sample.image[:, ::-1]),
        None if ids is None else np.ascontiguousarray(ids[:, ::-1]),
        None if depth is None else np.ascontiguousarray(depth[:, ::-1]),
    )
