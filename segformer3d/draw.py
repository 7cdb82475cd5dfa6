"""Pictures for people: class colours, depth colours, overlays and three-panel frames.

Every picture is uint8 (H, W, 3) in RGB. Depth is float32 in metres, or in a model's own units
where it is relative; a pixel that is not finite or not above 0 is invalid.
"""

import math
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from segformer3d.labels import CLASSES, NUM_CLASSES, PALETTE

U8Array = npt.NDArray[np.uint8]
F32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
Color = tuple[int, int, int]

NEAR_M: Final = 2.0
FAR_M: Final = 80.0
OVERLAY_ALPHA: Final = 0.55

_INVALID_GREY: Final = 56
_PANEL_GREY: Final = 96
_PAPER: Final = (24, 24, 24)
_INK: Final = (235, 235, 235)
_FONT: Final = cv2.FONT_HERSHEY_SIMPLEX
_LEGEND_ROWS: Final = 4
_TICKS_M: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def colorize_classes(class_ids: U8Array) -> U8Array:
    """Paints each pixel in its Cityscapes colour.

    Args:
        class_ids: uint8 (H, W), train ids; 255 is ignore.

    Returns:
        uint8 (H, W, 3), RGB; ignored pixels are black.
    """
    return PALETTE[class_ids]


def overlay(frame: U8Array, class_ids: U8Array, alpha: float = OVERLAY_ALPHA) -> U8Array:
    """Lays the class colours over a frame; ignored pixels keep the frame.

    Args:
        frame: uint8 (H, W, 3), RGB.
        class_ids: uint8 (H, W), train ids.
        alpha: Weight of the colours, 0 (the frame) to 1 (the colours).

    Returns:
        uint8 (H, W, 3), RGB.
    """
    mixed = cv2.addWeighted(frame, 1.0 - alpha, colorize_classes(class_ids), alpha, 0.0)
    return np.where((class_ids < NUM_CLASSES)[..., None], mixed, frame)


def valid_depth(depth: F32Array) -> BoolArray:
    """Returns bool (H, W): where the depth is finite and above 0."""
    return np.isfinite(depth) & (depth > 0)


def resize_depth(depth: F32Array, size: tuple[int, int]) -> F32Array:
    """Resizes depth bilinearly without letting invalid pixels bleed into valid ones.

    A normalised convolution (Knutsson and Westin, CVPR 1993): values and validity are resized
    alike and divided, so an output pixel is the weighted mean of the valid pixels around it. It
    is invalid where the nearest source pixel is.

    Args:
        depth: float32 (h, w); NaN, infinite, 0 or below is invalid.
        size: (width_px, height_px) of the result.

    Returns:
        float32 (height_px, width_px); invalid pixels are 0.
    """
    valid = valid_depth(depth)
    values = np.where(valid, depth, 0).astype(np.float32)
    weights = valid.astype(np.float32)
    value_sum = cv2.resize(values, size, interpolation=cv2.INTER_LINEAR)
    weight_sum = cv2.resize(weights, size, interpolation=cv2.INTER_LINEAR)
    keep = cv2.resize(weights, size, interpolation=cv2.INTER_NEAREST_EXACT) > 0
    keep &= weight_sum > 0
    resized = np.zeros((size[1], size[0]), np.float32)
    np.divide(value_sum, weight_sum, out=resized, where=keep)
    return resized


def _color_ramp(fraction: F32Array) -> U8Array:
    """Maps 0 to 1 (clipped) to RGB, dark to bright."""
    levels = np.rint(np.clip(fraction, 0, 1) * 255).astype(np.uint8)
    return _RAMP_RGB[levels]


# Plasma: its lightness rises evenly (equal steps look equal, and it survives greyscale printing),
# and unlike inferno and viridis it comes near neither black nor grey, so invalid stays apart.
# Turbo separates more levels, but its lightness goes up and down again.
_RAMP_RGB: Final = np.ascontiguousarray(
    cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_PLASMA)[:, 0, ::-1]
)


def _nearness(depth: F32Array, near_m: float, far_m: float) -> F32Array:
    """Returns 1 at `near_m` and 0 at `far_m`, linear in log depth: a ratio is a colour step."""
    valid = np.where(valid_depth(depth), depth, far_m)
    clipped = np.clip(valid, near_m, far_m).astype(np.float32)
    nearness = np.log(far_m / clipped) / math.log(far_m / near_m)
    return np.asarray(nearness, dtype=np.float32)


def colorize_depth(depth: F32Array, *, near_m: float = NEAR_M, far_m: float = FAR_M) -> U8Array:
    """Paints depth with the plasma map: near is bright, far is dark, on a log scale.

    The range is fixed by the caller and never taken from the frame, so one colour is one
    distance throughout a video.

    Args:
        depth: float32 (H, W), metres; NaN, infinite, 0 or below is invalid and drawn dark grey.
        near_m: Depth of the brightest colour, above 0.
        far_m: Depth of the darkest colour, above `near_m`.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    picture = _color_ramp(_nearness(depth, near_m, far_m))
    picture[~valid_depth(depth)] = _INVALID_GREY
    return picture


def colorize_relative_depth(depth: F32Array) -> U8Array:
    """Paints depth of unknown scale with the plasma map: low is dark, high is bright.

    The ends are the 2nd and 98th percentile of the frame's own valid pixels, so colours of two
    frames do not compare.

    Args:
        depth: float32 (H, W); NaN, infinite, 0 or below is invalid and drawn dark grey.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    valid = valid_depth(depth)
    low, high = np.percentile(depth[valid], (2, 98)) if valid.any() else (0.0, 1.0)
    spread = max(float(high - low), 1e-12)
    picture = _color_ramp(((np.where(valid, depth, low) - low) / spread).astype(np.float32))
    picture[~valid] = _INVALID_GREY
    return picture


@dataclass(frozen=True, slots=True)
class _Lettering:
    """Text size for a panel of some size; one row of a legend is `row_px` high."""

    row_px: int
    scale: float
    thickness: int

    @property
    def baseline_px(self) -> int:
        return round(0.72 * self.row_px)

    def width_px(self, text: str) -> int:
        return int(cv2.getTextSize(text, _FONT, self.scale, self.thickness)[0][0])

    def write(self, picture: U8Array, text: str, x_px: int, y_px: int, ink: Color = _INK) -> None:
        """Writes `text` into the row whose top left corner is (x_px, y_px)."""
        origin = (x_px, y_px + self.baseline_px)
        cv2.putText(picture, text, origin, _FONT, self.scale, ink, self.thickness, cv2.LINE_AA)


def _lettering(width_px: int, height_px: int) -> _Lettering | None:
    """Returns text that suits a panel, or None where the panel is too small to read any."""
    if width_px < 96 or height_px < 64:
        return None
    row_px = max(12, round(min(height_px * 0.05, width_px * 0.033)))
    return _Lettering(row_px=row_px, scale=row_px / 36, thickness=max(1, row_px // 22))


def _blank(width_px: int, height_px: int, color: Color = _PAPER) -> U8Array:
    return np.full((height_px, width_px, 3), color, np.uint8)


def _classes_by_area(class_ids: U8Array) -> list[int]:
    """Returns the train ids present, the largest first (ties: the lower id)."""
    counts = np.bincount(class_ids.reshape(-1), minlength=NUM_CLASSES)[:NUM_CLASSES]
    order = np.argsort(-counts, kind="stable")
    return [int(train_id) for train_id in order if counts[train_id]]


def legend(class_ids: U8Array, *, width_px: int, height_px: int) -> U8Array:
    """Draws a swatch and a name for each class present, the largest area first.

    Where they do not all fit, the smallest classes make room for "+n".

    Args:
        class_ids: uint8 (H, W), train ids; ignored pixels have no entry.
        width_px: Width of the picture.
        height_px: Height of the picture: four rows of text.

    Returns:
        uint8 (height_px, width_px, 3), RGB.
    """
    picture = _blank(width_px, height_px)
    row_px = max(1, height_px // _LEGEND_ROWS)
    text = _Lettering(row_px=row_px, scale=row_px / 36, thickness=max(1, row_px // 22))
    swatch_px = max(1, round(0.6 * row_px))
    column_px = swatch_px + row_px + max(text.width_px(entry.name) for entry in CLASSES)
    num_columns = max(1, width_px // column_px)
    present = _classes_by_area(class_ids)
    capacity = num_columns * _LEGEND_ROWS
    shown = present if len(present) <= capacity else present[: capacity - 1]
    for slot, train_id in enumerate(shown):
        x_px = (slot % num_columns) * column_px + row_px // 4
        y_px = (slot // num_columns) * row_px
        top = y_px + (row_px - swatch_px) // 2
        picture[top : top + swatch_px, x_px : x_px + swatch_px] = CLASSES[train_id].color
        text.write(picture, CLASSES[train_id].name, x_px + swatch_px + row_px // 4, y_px)
    if len(shown) < len(present):
        x_px = ((capacity - 1) % num_columns) * column_px + row_px // 4
        text.write(picture, f"+{len(present) - len(shown)}", x_px, (_LEGEND_ROWS - 1) * row_px)
    return picture


def _scale_bar(width_px: int, text: _Lettering, *, near_m: float, far_m: float) -> U8Array:
    """Draws the colours from `near_m` to `far_m` with ticks in metres below."""
    picture = _blank(width_px, text.row_px * _LEGEND_ROWS)
    left, right = text.row_px, width_px - text.row_px
    fraction = np.linspace(1, 0, right - left, dtype=np.float32)
    picture[text.row_px // 2 : text.row_px * 2, left:right] = _color_ramp(fraction)
    free_from = 0
    for metres in _TICKS_M:
        if not near_m <= metres <= far_m:
            continue
        position = left + (right - left - 1) * math.log(metres / near_m) / math.log(far_m / near_m)
        label = f"{metres} m"
        start = round(position) - text.width_px(label) // 2
        picture[text.row_px * 2 : text.row_px * 9 // 4, round(position)] = _INK
        if start >= free_from and start + text.width_px(label) <= width_px:
            text.write(picture, label, start, text.row_px * 9 // 4)
            free_from = start + text.width_px(label) + text.row_px // 3
    return picture


def _relative_bar(width_px: int, text: _Lettering) -> U8Array:
    """Draws the colours from low to high, and says that they have no unit."""
    picture = _blank(width_px, text.row_px * _LEGEND_ROWS)
    left, right = text.row_px, width_px - text.row_px
    fraction = np.linspace(0, 1, right - left, dtype=np.float32)
    picture[text.row_px // 2 : text.row_px * 2, left:right] = _color_ramp(fraction)
    y_px = text.row_px * 9 // 4
    text.write(picture, "low", left, y_px)
    text.write(picture, "high", right - text.width_px("high"), y_px)
    text.write(picture, "relative", (width_px - text.width_px("relative")) // 2, y_px)
    return picture


def _absent(width_px: int, height_px: int, message: str) -> U8Array:
    """Draws a grey panel with a message in its middle, as large as fits."""
    picture = _blank(width_px, height_px, (_PANEL_GREY, _PANEL_GREY, _PANEL_GREY))
    text = _lettering(width_px, height_px)
    if text is not None:
        x_px = (width_px - text.width_px(message)) // 2
        text.write(picture, message, x_px, (height_px - text.row_px) // 2)
    return picture


def _depth_panel(
    depth: F32Array | None, size: tuple[int, int], *, relative: bool, near_m: float, far_m: float
) -> U8Array:
    if depth is None:
        return _absent(*size, "no depth head")
    resized = resize_depth(depth, size)
    if relative:
        return colorize_relative_depth(resized)
    return colorize_depth(resized, near_m=near_m, far_m=far_m)


def three_panels(
    frame: U8Array,
    class_ids: U8Array | None,
    depth: F32Array | None,
    *,
    relative: bool = False,
    near_m: float = NEAR_M,
    far_m: float = FAR_M,
) -> U8Array:
    """Draws frame | segmentation with its legend | depth with its scale, side by side.

    The legend and the scale bar stand in a strip below the panels, whose height depends on the
    frame's size alone, so all frames of a video give one picture size. Frames below 96x64 get no
    strip: nothing would be readable. A head that is missing gives a grey panel saying so.

    Args:
        frame: uint8 (H, W, 3), RGB.
        class_ids: uint8 (H, W), train ids at the frame's size, or None.
        depth: float32 (h, w) of any size, metres unless `relative`; or None.
        relative: The depth has no unit: label it so, and stretch its own range.
        near_m: Depth of the brightest colour.
        far_m: Depth of the darkest colour.

    Returns:
        uint8 (H + strip, 3 W, 3), RGB.
    """
    height_px, width_px = frame.shape[:2]
    size = (width_px, height_px)
    segmentation = (
        _absent(*size, "no segmentation head") if class_ids is None else overlay(frame, class_ids)
    )
    depth_panel = _depth_panel(depth, size, relative=relative, near_m=near_m, far_m=far_m)
    panels = np.concatenate([frame, segmentation, depth_panel], axis=1)
    text = _lettering(width_px, height_px)
    if text is None:
        return panels
    strip = _blank(3 * width_px, text.row_px * _LEGEND_ROWS)
    if class_ids is not None:
        strip[:, width_px : 2 * width_px] = legend(
            class_ids, width_px=width_px, height_px=len(strip)
        )
    if depth is not None:
        strip[:, 2 * width_px :] = (
            _relative_bar(width_px, text)
            if relative
            else _scale_bar(width_px, text, near_m=near_m, far_m=far_m)
        )
    return np.concatenate([panels, strip], axis=0)
