"""Rough metric depth from class labels alone: a flat road seen by a camera of known height.

What is ground lies on a plane, and what stands on it is as far away as the spot where it stands
(the "photo pop-up" of Hoiem et al., SIGGRAPH 2005). It teaches a network the order and about the
scale of real frames, where nothing was measured; it is no truth to measure with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from segformer3d.labels import CLASS_NAMES, IGNORE_ID

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUND = tuple(CLASS_NAMES.index(name) for name in ("road", "sidewalk", "terrain"))
SKY, POLE = CLASS_NAMES.index("sky"), CLASS_NAMES.index("pole")
ON_POLES = tuple(CLASS_NAMES.index(name) for name in ("traffic light", "traffic sign"))
DEPTH_MAX_M = 80.0
ROAD_SHARE = 0.02  # of the width: so much road makes a row one that the road reaches


def road_top(class_ids: NDArray[np.uint8]) -> int | None:
    """Return the highest row that the road reaches, None without road."""
    rows = np.flatnonzero((class_ids == GROUND[0]).mean(axis=1) > ROAD_SHARE)
    return int(rows[0]) if len(rows) else None


def ground_plane_depth(
    class_ids: NDArray[np.uint8], *, horizon_px: float, focal_px: float, height_m: float
) -> NDArray[np.float32]:
    """Guess depth from classes.

    Args:
        class_ids: uint8 (H, W), train ids.
        horizon_px: Row of the horizon; a level camera is assumed.
        focal_px: Focal length in pixels.
        height_m: The camera's height above the road.

    Returns:
        float32 (H, W), metres, 0 where nothing can be said: sky, what hides its own foot behind
        something else or below the frame, and what is farther than 80 m.
    """
    height, width = class_ids.shape
    rows = np.arange(height, dtype=np.float64)
    below = np.maximum(rows + 0.5 - horizon_px, 1e-6)
    plane_m = np.where(rows + 0.5 > horizon_px, focal_px * height_m / below, 0.0)
    plane_m[plane_m > DEPTH_MAX_M] = 0.0
    is_ground = np.isin(class_ids, GROUND)
    depth = np.zeros((height, width), np.float32)
    foot_m = np.zeros(width)  # of what the column shows just below; 0 is unknown
    under = np.full(width, IGNORE_ID, np.uint8)
    for row in range(height - 1, -1, -1):
        ids = class_ids[row]
        under_is_ground = is_ground[row + 1] if row + 1 < height else np.zeros(width, bool)
        stands = (ids == under) | under_is_ground | (np.isin(ids, ON_POLES) & (under == POLE))
        known = stands & (ids != SKY) & (ids != IGNORE_ID)
        foot_m = np.where(is_ground[row], plane_m[row], np.where(known, foot_m, 0.0))
        depth[row] = foot_m
        under = ids
    return depth
