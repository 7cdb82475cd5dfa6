"""Surfaces as a camera sees them: planes of inverse depth, boxes of pixels, light.

For a pinhole camera the inverse depth of a plane is linear in the picture (Heckbert, "Fundamentals
of Texture Mapping and Image Warping", 1989), so depth is exact at every pixel centre.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from segformer3d.scenes.surfaces import Surface
from segformer3d.scenes.view import View
from segformer3d.scenes.world import BoolArray, F64Array, Light

NEAR_M: Final = 0.5
"""What is nearer to the camera is not drawn."""


class Projected(NamedTuple):
    """Surfaces in a view, nearest first.

    `planes` float64 (N, 3, 3): times (u, v, 1) gives (s, t, 1) / z, where (s, t) is the place on
    the surface, 0 to 1, and z the depth. `boxes` int64 (N, 4): left, top, right, bottom pixels,
    half open. `areas_px` (N,): of the whole surface's box, for the texture's sharpness.
    `shades` (N,): factor of its light.
    """

    order: npt.NDArray[np.int64]
    planes: F64Array
    boxes: npt.NDArray[np.int64]
    areas_px: F64Array
    shades: F64Array


def _pixel_boxes(corners: F64Array, view: View) -> tuple[npt.NDArray[np.int64], F64Array]:
    """Returns the pixel boxes (N, 4) and their areas before the picture's edge cuts them.

    `corners` is float64 (N, 4, 3) in camera space, in ring order. What lies nearer than `NEAR_M`
    is cut off first, so that every point left can be projected.
    """
    following = np.roll(corners, -1, axis=1)
    depth, next_depth = corners[..., 2], following[..., 2]
    crosses = (depth < NEAR_M) != (next_depth < NEAR_M)
    step = np.where(crosses, next_depth - depth, 1.0)
    share = np.where(crosses, (NEAR_M - depth) / step, 0.0)[..., None]
    points = np.concatenate([corners, corners + share * (following - corners)], axis=1)
    usable = np.concatenate([depth >= NEAR_M, crosses], axis=1)[..., None]
    projected = points @ view.intrinsics.T
    pixels = projected[..., :2] / np.where(usable, projected[..., 2:], 1.0)
    low = np.where(usable, pixels, np.inf).min(axis=1)
    high = np.where(usable, pixels, -np.inf).max(axis=1)
    areas = np.prod(np.maximum(high - low, 0.0), axis=1, where=np.isfinite(low))
    limit = np.array([view.width_px, view.height_px])
    first = np.clip(np.nan_to_num(np.ceil(low), posinf=1e9), 0, limit).astype(np.int64)
    last = np.clip(np.nan_to_num(np.floor(high) + 1, neginf=-1e9), 0, limit).astype(np.int64)
    return np.concatenate([first, last], axis=1), areas


def _shades(normals: F64Array, to_camera: F64Array, flat: BoolArray, light: Light) -> F64Array:
    """Returns the light on each surface (N,): Lambert on the side that the camera sees."""
    facing = np.sign(np.einsum("ni,ni->n", normals, to_camera))[:, None]
    unit = facing * normals / np.linalg.norm(normals, axis=1, keepdims=True)
    lit = np.maximum(unit @ np.array(light.sun), 0.0)
    lit = np.where(flat, 0.6, lit)
    return np.asarray(light.ambient + (1.0 - light.ambient) * 1.15 * lit, dtype=np.float64)


def project(surfaces: list[Surface], offsets: F64Array, view: View, light: Light) -> Projected:
    """Returns the surfaces in the picture; `offsets` float64 (N,) is added to each one's z."""
    corner = np.array([surface.corner for surface in surfaces])
    corner[:, 2] += offsets
    along = np.array([surface.along for surface in surfaces])
    down = np.array([surface.down for surface in surfaces])
    flat = np.array([surface.texture.cutout for surface in surfaces])
    frames = np.stack([along, down, corner - view.position], axis=2)
    frames = view.rotation @ frames
    ring = [(0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)]
    boxes, areas = _pixel_boxes(np.swapaxes(frames @ np.array(ring).T, 1, 2), view)
    seen = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    seen &= np.abs(np.linalg.det(frames)) > 1e-9
    nearest = frames[:, 2, 2] + np.minimum(frames[:, 2, 0], 0) + np.minimum(frames[:, 2, 1], 0)
    kept = np.flatnonzero(seen)
    order = kept[np.argsort(nearest[kept], kind="stable")]
    return Projected(
        order=order,
        planes=np.linalg.inv(frames[order]) @ np.linalg.inv(view.intrinsics),
        boxes=boxes[order],
        areas_px=areas[order],
        shades=_shades(
            np.cross(along, down)[order], (view.position - corner)[order], flat[order], light
        ),
    )
