"""Draws one frame of a drive with a z-buffer: surfaces, shadows, air, bonnet, sensor."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from segformer3d.labels import IGNORE_ID
from segformer3d.scenes.projection import NEAR_M, Projected, project
from segformer3d.scenes.sky import draw_sky
from segformer3d.scenes.surfaces import Surface
from segformer3d.scenes.things import surfaces_at
from segformer3d.scenes.view import view_at
from segformer3d.scenes.world import (
    TRAIN_IDS,
    BoolArray,
    Camera,
    Drive,
    F32Array,
    F64Array,
    Light,
    Scene,
    U8Array,
)


class _Buffers(NamedTuple):
    """What is being drawn: RGB, train ids and inverse depth (0: nothing yet)."""

    rgb: U8Array
    class_ids: U8Array
    inverse_m: F32Array


class _Piece(NamedTuple):
    """One surface in the picture: its part of `Projected`, and its box of pixels."""

    surface: Surface
    plane: F64Array
    box: tuple[int, int, int, int]
    area_px: float
    shade: float

    @property
    def window(self) -> tuple[slice, slice]:
        """Index of the box in a buffer."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)


def _pieces(
    surfaces: list[Surface], projected: Projected, *, are_shadows: bool
) -> Iterator[_Piece]:
    """Yields either the shadows or all other surfaces, nearest first."""
    for index, plane, (left, top, right, bottom), area_px, shade in zip(*projected, strict=True):
        if surfaces[index].is_shadow == are_shadows:
            box = (int(left), int(top), int(right), int(bottom))
            yield _Piece(surfaces[index], plane, box, float(area_px), float(shade))


def _sample(piece: _Piece) -> U8Array:
    """Returns the texture as seen through the box of pixels, uint8 (h, w, 4)."""
    levels = piece.surface.texture.levels
    repeat_s, repeat_t = piece.surface.repeat
    num_texels = levels[0].shape[0] * levels[0].shape[1] * repeat_s * repeat_t
    level = round(0.5 * math.log2(max(num_texels / max(piece.area_px, 1.0), 1.0)))
    picture = levels[min(level, len(levels) - 1)]
    height_px, width_px = picture.shape[:2]
    left, top, right, bottom = piece.box
    to_texels = np.array(
        [[repeat_s * width_px, 0, -0.5], [0, repeat_t * height_px, -0.5], [0, 0, 1]]
    )
    from_box = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]])
    border = cv2.BORDER_REPLICATE if piece.surface.repeat == (1.0, 1.0) else cv2.BORDER_WRAP
    return np.asarray(
        cv2.warpPerspective(
            picture,
            to_texels @ piece.plane @ from_box,
            (right - left, bottom - top),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=border,
        ),
        dtype=np.uint8,
    )


def _coverage(piece: _Piece) -> tuple[BoolArray, F32Array]:
    """Returns which pixel centres of the box the parallelogram covers, and its inverse depth."""
    left, top, right, bottom = piece.box
    columns = piece.plane[:, :1] * np.arange(left, right)
    rows = piece.plane[:, 1:2] * np.arange(top, bottom) + piece.plane[:, 2:]
    s, t, inverse = (
        (column + row[:, None]).astype(np.float32)
        for column, row in zip(columns, rows, strict=True)
    )
    inside = (s >= 0) & (t >= 0) & (s <= inverse) & (t <= inverse)
    inside &= inverse < 1 / NEAR_M
    return inside, inverse


def _draw_surfaces(surfaces: list[Surface], projected: Projected, buffers: _Buffers) -> None:
    """Draws all surfaces but shadows, nearest first, so that most hidden ones cost nothing."""
    for piece in _pieces(surfaces, projected, are_shadows=False):
        covered, inverse = _coverage(piece)
        window = piece.window
        visible = covered & (inverse > buffers.inverse_m[window])
        if not visible.any():
            continue
        picture = _sample(piece)
        if piece.surface.texture.cutout:
            visible &= picture[..., 3] > 127
        shaded = cv2.convertScaleAbs(picture[..., :3], alpha=piece.shade)
        np.copyto(buffers.rgb[window], shaded, where=visible[..., None])
        np.copyto(buffers.inverse_m[window], inverse, where=visible)
        np.copyto(buffers.class_ids[window], np.uint8(piece.surface.class_id), where=visible)


def _draw_shadows(
    surfaces: list[Surface], projected: Projected, light: Light, buffers: _Buffers
) -> None:
    """Darkens the ground where a shadow's plane is what the pixel shows."""
    for piece in _pieces(surfaces, projected, are_shadows=True):
        covered, inverse = _coverage(piece)
        covered &= np.abs(inverse - buffers.inverse_m[piece.window]) < 1e-4 * inverse
        if covered.any():
            darkness = _sample(piece)[..., 3] * np.float32(1 / 255)
            factor = 1 - (0.75 - 0.35 * light.ambient) * darkness * covered
            ground = buffers.rgb[piece.window]
            ground[...] = ground * factor[..., None]


def _draw_bonnet(camera: Camera, frame: F32Array, buffers: _Buffers) -> None:
    """Draws the camera car's own bonnet, which Cityscapes leaves out of every class."""
    height_px, width_px = frame.shape[:2]
    across = np.linspace(-1, 1, width_px, dtype=np.float32)
    top = height_px * (1 - camera.bonnet * (1 - 0.6 * across**4))
    below = np.arange(height_px, dtype=np.float32)[:, None] - top
    covered = below >= 0
    shine = 30 + 45 * np.exp(-np.maximum(below, 0) / (0.03 * height_px))
    frame[covered] = shine[covered][:, None]
    buffers.class_ids[covered] = IGNORE_ID
    buffers.inverse_m[covered] = 0


def _expose(frame: F32Array, drive: Drive, time_s: float) -> U8Array:
    """Returns what the sensor makes of the light: lens blur, gain, corner shade and noise."""
    height_px, width_px = frame.shape[:2]
    blurred = cv2.GaussianBlur(frame, (3, 3), 0.6)
    columns = np.linspace(-1, 1, width_px, dtype=np.float32) ** 2
    rows = np.linspace(-1, 1, height_px, dtype=np.float32)[:, None] ** 2
    corner_shade = 1 - 0.09 * (columns + rows)
    rng = np.random.default_rng([drive.seed, round(time_s * 1e6)])
    noise = rng.standard_normal((height_px, width_px), dtype=np.float32) * drive.light.noise
    exposed = blurred * (corner_shade[..., None] * np.array(drive.light.gain, np.float32))
    exposed += noise[..., None]
    return np.asarray(np.clip(exposed, 0, 255), dtype=np.uint8)


def render(drive: Drive, time_s: float, width_px: int, height_px: int) -> Scene:
    """Renders one frame of a drive. The same arguments always give the same frame.

    Args:
        drive: From `make_drive`, or a changed copy of one.
        time_s: Time since the drive's start, 0 or more.
        width_px: Width of the frame.
        height_px: Height of the frame.

    Returns:
        The frame with its class ids and depths. Depth is what a pinhole camera means by it,
        metres along the optical axis at the pixel's centre; 0 where there is none.
    """
    view = view_at(drive, time_s, width_px, height_px)
    surfaces, offsets = surfaces_at(drive, time_s)
    projected = project(surfaces, offsets, view, drive.light)
    buffers = _Buffers(
        rgb=np.zeros((height_px, width_px, 3), np.uint8),
        class_ids=np.full((height_px, width_px), TRAIN_IDS["sky"], np.uint8),
        inverse_m=np.zeros((height_px, width_px), np.float32),
    )
    _draw_surfaces(surfaces, projected, buffers)
    _draw_shadows(surfaces, projected, drive.light, buffers)
    hit = buffers.inverse_m > 0
    depth_m = np.divide(1, buffers.inverse_m, out=np.zeros_like(buffers.inverse_m), where=hit)
    clear = np.where(hit, np.exp(depth_m * (-1 / drive.light.haze_m)), 0)[..., None]
    horizon = np.array(drive.light.horizon, np.float32)
    air = np.where(hit[..., None], horizon, draw_sky(drive, view))
    frame: F32Array = air + clear * (buffers.rgb.astype(np.float32) - air)
    if drive.camera.bonnet > 0:
        _draw_bonnet(drive.camera, frame, buffers)
        depth_m[buffers.inverse_m == 0] = 0
    return Scene(_expose(frame, drive, time_s), buffers.class_ids, depth_m)
