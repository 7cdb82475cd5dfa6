"""Pictures for people: class colours, depth colours, overlays, three-panel frames, attention.

Every picture is uint8 (H, W, 3) in RGB. Depth is float32 in metres, or in a model's own units
where it is relative; a pixel that is not finite or not above 0 is invalid.
"""

import math
from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from segformer3d.labels import CLASSES, NUM_CLASSES, PALETTE
from segformer3d.lettering import INK, Lettering, blank, lettering_for

U8Array = npt.NDArray[np.uint8]
F32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

NEAR_M: Final = 2.0
FAR_M: Final = 80.0
OVERLAY_ALPHA: Final = 0.55
ATTENTION_ALPHA: Final = 0.7
MIN_ATTENTION: Final = 1 / 8
MAX_ATTENTION: Final = 32.0

_INVALID_GREY: Final = 56
_PANEL_GREY: Final = 96
_LEGEND_ROWS: Final = 4
_TICKS_M: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_TICKS_ATTENTION: Final = {"1/8": 0.0, "even": 0.375, "x 4": 0.625, "x 32": 1.0}
_MAX_TILE_PX: Final = 640
_TILE_GAP_PX: Final = 4


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


def relative_span(depth: F32Array) -> tuple[float, float] | None:
    """Returns the 2nd and 98th percentile of the valid depth, None where there is none.

    Args:
        depth: float32 of any shape; NaN, infinite, 0 or below is invalid.
    """
    values = depth[valid_depth(depth)]
    if not values.size:
        return None
    low, high = np.percentile(values, (2, 98))
    return float(low), float(high)


def colorize_relative_depth(depth: F32Array, *, span: tuple[float, float] | None = None) -> U8Array:
    """Paints depth of unknown scale with the plasma map: low is dark, high is bright.

    Args:
        depth: float32 (H, W); NaN, infinite, 0 or below is invalid and drawn dark grey.
        span: Depths of the darkest and the brightest colour; one span for all frames of a video
            keeps its colours from flickering. By default the frame's own `relative_span`, so
            that colours of two frames do not compare.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    valid = valid_depth(depth)
    low, high = span or relative_span(depth) or (0.0, 1.0)
    spread = max(high - low, 1e-12)
    picture = _color_ramp(((np.where(valid, depth, low) - low) / spread).astype(np.float32))
    picture[~valid] = _INVALID_GREY
    return picture


def _classes_by_area(class_ids: U8Array) -> list[int]:
    """Returns the train ids present, the largest first (ties: the lower id)."""
    counts = np.bincount(class_ids.reshape(-1), minlength=NUM_CLASSES)[:NUM_CLASSES]
    order = np.argsort(-counts, kind="stable")
    return [int(train_id) for train_id in order if counts[train_id]]


def legend(class_ids: U8Array, *, width_px: int, height_px: int) -> U8Array:
    """Draws a swatch and a name for each class present, in the order of their train ids.

    Where they do not all fit, the smallest classes make room for "+n". An order by area would
    dance in a video.

    Args:
        class_ids: uint8 (H, W), train ids; ignored pixels have no entry.
        width_px: Width of the picture.
        height_px: Height of the picture: four rows of text.

    Returns:
        uint8 (height_px, width_px, 3), RGB.
    """
    picture = blank(width_px, height_px)
    row_px = max(1, height_px // _LEGEND_ROWS)
    text = Lettering(row_px=row_px, scale=row_px / 36, thickness=max(1, row_px // 22))
    swatch_px = max(1, round(0.6 * row_px))
    column_px = swatch_px + row_px + max(text.width_px(entry.name) for entry in CLASSES)
    num_columns = max(1, width_px // column_px)
    present = _classes_by_area(class_ids)
    capacity = num_columns * _LEGEND_ROWS
    shown = present if len(present) <= capacity else present[: capacity - 1]
    for slot, train_id in enumerate(sorted(shown)):
        x_px = (slot % num_columns) * column_px + row_px // 4
        y_px = (slot // num_columns) * row_px
        top = y_px + (row_px - swatch_px) // 2
        picture[top : top + swatch_px, x_px : x_px + swatch_px] = CLASSES[train_id].color
        text.write(picture, CLASSES[train_id].name, x_px + swatch_px + row_px // 4, y_px)
    if len(shown) < len(present):
        x_px = ((capacity - 1) % num_columns) * column_px + row_px // 4
        text.write(picture, f"+{len(present) - len(shown)}", x_px, (_LEGEND_ROWS - 1) * row_px)
    return picture


def _bar(width_px: int, text: Lettering, ticks: dict[str, float], *, end: int = 1) -> U8Array:
    """Draws the ramp up to `end` (from 0) or down (from 1), with ticks at shares of its length."""
    picture = blank(width_px, text.row_px * _LEGEND_ROWS)
    left, right = text.row_px, width_px - text.row_px
    fraction = np.linspace(1 - end, end, right - left, dtype=np.float32)
    picture[text.row_px // 2 : text.row_px * 2, left:right] = _color_ramp(fraction)
    free_from = 0
    for label, share in ticks.items():
        position = left + round((right - left - 1) * share)
        label_px = text.width_px(label)
        start = min(position - label_px // 2, width_px - label_px)
        picture[text.row_px * 2 : text.row_px * 9 // 4, position] = INK
        if start >= free_from:
            text.write(picture, label, start, text.row_px * 9 // 4)
            free_from = start + label_px + text.row_px // 3
    return picture


def _depth_bar(
    width_px: int, text: Lettering, *, relative: bool, near_m: float, far_m: float
) -> U8Array:
    if relative:
        return _bar(width_px, text, {"low": 0.0, "relative": 0.5, "high": 1.0})
    ticks = {
        f"{metres} m": math.log(metres / near_m) / math.log(far_m / near_m)
        for metres in _TICKS_M
        if near_m <= metres <= far_m
    }
    return _bar(width_px, text, ticks, end=0)


def message_picture(width_px: int, height_px: int, message: str) -> U8Array:
    """Draws a grey picture with a message in its middle, if it is large enough to read any.

    Returns:
        uint8 (height_px, width_px, 3), RGB.
    """
    picture = blank(width_px, height_px, (_PANEL_GREY, _PANEL_GREY, _PANEL_GREY))
    text = lettering_for(width_px, height_px)
    if text is not None:
        x_px = (width_px - text.width_px(message)) // 2
        text.write(picture, message, x_px, (height_px - text.row_px) // 2)
    return picture


def _depth_panel(
    depth: F32Array | None,
    size: tuple[int, int],
    *,
    relative: bool,
    span: tuple[float, float] | None,
    near_m: float,
    far_m: float,
) -> U8Array:
    if depth is None:
        return message_picture(*size, "no depth head")
    resized = resize_depth(depth, size)
    if relative:
        return colorize_relative_depth(resized, span=span)
    return colorize_depth(resized, near_m=near_m, far_m=far_m)


def three_panels(
    frame: U8Array,
    class_ids: U8Array | None,
    depth: F32Array | None,
    *,
    relative: bool = False,
    span: tuple[float, float] | None = None,
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
        relative: The depth has no unit: label it so, and stretch a range of its own.
        span: That range, as in `colorize_relative_depth`.
        near_m: Depth of the brightest colour.
        far_m: Depth of the darkest colour.

    Returns:
        uint8 (H + strip, 3 W, 3), RGB.
    """
    height_px, width_px = frame.shape[:2]
    size = (width_px, height_px)
    segmentation = (
        message_picture(*size, "no segmentation head")
        if class_ids is None
        else overlay(frame, class_ids)
    )
    depth_panel = _depth_panel(
        depth, size, relative=relative, span=span, near_m=near_m, far_m=far_m
    )
    panels = np.concatenate([frame, segmentation, depth_panel], axis=1)
    text = lettering_for(width_px, height_px)
    if text is None:
        return panels
    strip = blank(3 * width_px, text.row_px * _LEGEND_ROWS)
    if class_ids is not None:
        strip[:, width_px : 2 * width_px] = legend(
            class_ids, width_px=width_px, height_px=len(strip)
        )
    if depth is not None:
        strip[:, 2 * width_px :] = _depth_bar(
            width_px, text, relative=relative, near_m=near_m, far_m=far_m
        )
    return np.concatenate([panels, strip], axis=0)


def attention_grid(
    frame: U8Array, maps: Sequence[tuple[str, F32Array]], *, at: tuple[float, float] | None = None
) -> U8Array:
    """Draws attention maps over a frame, one tile each, in a grid that is nearly square.

    Colours are on a log scale around an even spread of attention, from `MIN_ATTENTION` to
    `MAX_ATTENTION` times that, the same in every tile and every frame.

    Args:
        frame: uint8 (H, W, 3), RGB.
        maps: A label and a float32 (h, w) that sums to 1, for each tile.
        at: Place of the query as shares of width and height, marked in every tile; or None.

    Returns:
        uint8 (height, width, 3), RGB; both sides are even and depend on the frame's size and the
        number of maps alone.
    """
    scale = min(1.0, _MAX_TILE_PX / max(frame.shape[:2]))
    width_px, height_px = (max(1, round(side * scale)) for side in frame.shape[1::-1])
    small = np.asarray(cv2.resize(frame, (width_px, height_px), interpolation=cv2.INTER_AREA))
    text = lettering_for(width_px, height_px)
    label_px = text.row_px if text else 0
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    step_x, step_y = width_px + _TILE_GAP_PX, height_px + label_px + _TILE_GAP_PX
    bar_px = _LEGEND_ROWS * label_px
    total_x, total_y = columns * step_x, rows * step_y + bar_px
    picture = blank(total_x + total_x % 2, total_y + total_y % 2)
    for index, (label, attention) in enumerate(maps):
        x_px, y_px = index % columns * step_x, index // columns * step_y
        if text is not None:
            text.write(picture, label, x_px + label_px // 4, y_px)
        tile = _attention_tile(small, attention, at)
        picture[y_px + label_px : y_px + label_px + height_px, x_px : x_px + width_px] = tile
    if text is not None:
        picture[rows * step_y : total_y, :width_px] = _bar(width_px, text, _TICKS_ATTENTION)
    return picture


def _attention_tile(frame: U8Array, attention: F32Array, at: tuple[float, float] | None) -> U8Array:
    height_px, width_px = frame.shape[:2]
    resized = cv2.resize(attention, (width_px, height_px), interpolation=cv2.INTER_LINEAR)
    multiple = np.maximum(np.asarray(resized) * attention.size, MIN_ATTENTION)
    level = np.log(multiple / MIN_ATTENTION) / math.log(MAX_ATTENTION / MIN_ATTENTION)
    colors = _color_ramp(level.astype(np.float32))
    grey = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    tile = cv2.addWeighted(grey, 1.0 - ATTENTION_ALPHA, colors, ATTENTION_ALPHA, 0.0)
    if at is not None:
        center = (round(at[0] * (width_px - 1)), round(at[1] * (height_px - 1)))
        radius = max(3, min(width_px, height_px) // 28)
        for ink, thickness in (((0, 0, 0), 4), ((255, 255, 255), 2)):
            cv2.circle(tile, center, radius, ink, thickness, cv2.LINE_AA)
    return np.asarray(tile, np.uint8)
