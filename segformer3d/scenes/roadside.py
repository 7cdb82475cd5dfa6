"""What stands between kerb and houses: trees, hedges, fences, walls, lamps, signs and signals."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import cv2
import numpy as np

from segformer3d.scenes.canvas import (
    Canvas,
    Texture,
    column_texture,
    plain_texture,
    seamless_noise,
    shaded,
)
from segformer3d.scenes.surfaces import Surface, lengthwise, shadow, slope, upright
from segformer3d.scenes.world import Color, Thing

_NUM_CROWNS: Final = 8


@lru_cache(maxsize=64)
def _leaf_texture(style: int, color: Color) -> Texture:
    """A crown of leaves: clumps lit from above, with holes at the rim."""
    rng = np.random.default_rng(style)
    canvas = Canvas(128, 128, shaded(color, 0.6), opaque=False)
    for _ in range(110):
        angle, distance = rng.uniform(0, 2 * np.pi), 0.36 * np.sqrt(rng.random())
        x = 0.5 + distance * np.cos(angle) * 1.05
        y = 0.48 + distance * np.sin(angle) * 1.05
        light = 1.25 - 0.9 * y + rng.normal(0, 0.1)
        radius = rng.uniform(0.05, 0.13)
        canvas.disc(shaded(color, light), x, y, radius, radius)
    canvas.speckle(rng, 14, 1.3)
    alpha = canvas.rgba[..., 3].astype(np.float32)
    rim = cv2.GaussianBlur(alpha, (0, 0), 4) + 24 * seamless_noise(rng, alpha.shape, 1.6)
    canvas.rgba[..., 3] = np.where(rim > 120, 255, 0)
    return canvas.texture()


def build_tree(thing: Thing) -> Iterator[Surface]:
    """Yields a trunk and three layers of leaves, the middle one the largest."""
    trunk = column_texture((96, 78, 62))
    crown_m = thing.height_m * 0.3
    yield upright(
        thing, "vegetation", trunk, width_m=0.045 * thing.height_m, top_m=0.6 * thing.height_m
    )
    for layer in range(3):
        leaf = _leaf_texture((thing.style + layer) % _NUM_CROWNS, thing.color)
        yield upright(
            thing,
            "vegetation",
            leaf,
            x_m=(layer - 1) * 0.12 * thing.width_m,
            z_m=(1 - layer) * 0.18 * thing.width_m,
            width_m=thing.width_m * (0.85 if layer != 1 else 1.05),
            bottom_m=crown_m + (0.06 * thing.height_m if layer != 1 else 0.0),
            top_m=thing.height_m * (0.93 if layer != 1 else 1.0),
        )
    yield shadow(thing, is_round=True, grow=0.9)


def build_hedge(thing: Thing) -> Iterator[Surface]:
    """Yields the three faces of a box of leaves that can be seen."""
    leaves = plain_texture(thing.style % 16, thing.color, 16)
    repeat = (thing.length_m / 1.5, 1.0)
    yield lengthwise(thing, "vegetation", leaves, x_m=thing.inner_m, repeat=repeat)
    yield upright(thing, "vegetation", leaves)
    yield slope(
        thing,
        "vegetation",
        leaves,
        far=(thing.height_m, thing.length_m),
        near=(thing.height_m, 0.0),
    )


@lru_cache(maxsize=16)
def _fence_texture(color: Color) -> Texture:
    """One metre of boards; without gaps, for annotators give a fence's gaps to the fence."""
    canvas = Canvas(64, 64, shaded(color, 0.35), opaque=True)
    for board in range(5):
        left = board / 5
        canvas.box(shaded(color, 0.9 + 0.06 * (board % 3)), left + 0.02, 0, left + 0.18, 1)
    canvas.box(shaded(color, 0.8), 0, 0.14, 1, 0.22)
    canvas.box(shaded(color, 0.7), 0, 0.72, 1, 0.8)
    return canvas.texture()


def build_fence(thing: Thing) -> Iterator[Surface]:
    """Yields a board fence, of no thickness."""
    boards = _fence_texture(thing.color)
    yield lengthwise(thing, "fence", boards, x_m=0.0, repeat=(thing.length_m, 1.0))


@lru_cache(maxsize=16)
def _brick_texture(style: int, color: Color) -> Texture:
    rng = np.random.default_rng(style)
    canvas = Canvas(96, 96, shaded(color, 0.75), opaque=True)
    for row in range(12):
        for column in range(-1, 4):
            left = (column + 0.5 * (row % 2)) / 4
            brick = shaded(color, float(rng.uniform(0.85, 1.15)))
            canvas.box(brick, left + 0.012, row / 12 + 0.012, left + 0.24, (row + 1) / 12)
    return canvas.texture()


def build_wall(thing: Thing) -> Iterator[Surface]:
    """Yields the two faces of a garden wall that can be seen."""
    bricks = _brick_texture(thing.style % 8, thing.color)
    repeat = (thing.length_m, thing.height_m)
    yield lengthwise(thing, "wall", bricks, x_m=thing.inner_m, repeat=repeat)
    yield upright(thing, "wall", bricks)


def build_lamp(thing: Thing) -> Iterator[Surface]:
    """Yields a street lamp's pole and its arm towards the road."""
    steel = column_texture(thing.color)
    arm_m = 0.22 * thing.height_m
    yield upright(thing, "pole", steel)
    yield upright(
        thing,
        "pole",
        steel,
        x_m=math.copysign(arm_m / 2, -thing.x_m),
        width_m=arm_m,
        bottom_m=thing.height_m - 0.1,
    )


def _sign_circle(canvas: Canvas) -> None:
    canvas.disc((190, 25, 30), 0.5, 0.5, 0.48, 0.48)
    canvas.disc((235, 235, 235), 0.5, 0.5, 0.36, 0.36)
    canvas.box((25, 25, 25), 0.33, 0.32, 0.46, 0.68)
    canvas.box((25, 25, 25), 0.54, 0.32, 0.67, 0.68)


def _sign_triangle(canvas: Canvas) -> None:
    canvas.polygon((190, 25, 30), (0.5, 0.02), (0.99, 0.95), (0.01, 0.95))
    canvas.polygon((240, 240, 240), (0.5, 0.25), (0.8, 0.82), (0.2, 0.82))


def _sign_blue(canvas: Canvas) -> None:
    canvas.disc((25, 70, 160), 0.5, 0.5, 0.48, 0.48)
    canvas.polygon((240, 240, 240), (0.5, 0.15), (0.78, 0.5), (0.22, 0.5))
    canvas.box((240, 240, 240), 0.42, 0.45, 0.58, 0.85)


def _sign_stop(canvas: Canvas) -> None:
    corners = [(0.3, 0.02), (0.7, 0.02), (0.98, 0.3), (0.98, 0.7)]
    canvas.polygon((185, 20, 25), *corners, *[(1 - x, 1 - y) for x, y in corners])
    canvas.box((240, 240, 240), 0.15, 0.4, 0.85, 0.6)


def _sign_diamond(canvas: Canvas) -> None:
    canvas.polygon((245, 245, 240), (0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5))
    canvas.polygon((235, 180, 20), (0.5, 0.14), (0.86, 0.5), (0.5, 0.86), (0.14, 0.5))


_SIGNS: Final = (_sign_circle, _sign_triangle, _sign_blue, _sign_stop, _sign_diamond)


@lru_cache(maxsize=16)
def _sign_texture(style: int) -> Texture:
    canvas = Canvas(64, 64, (150, 150, 150), opaque=False)
    _SIGNS[style % len(_SIGNS)](canvas)
    return canvas.texture()


def build_sign(thing: Thing) -> Iterator[Surface]:
    """Yields a pole and one of five signs."""
    yield upright(thing, "pole", column_texture((150, 152, 155)), width_m=0.07)
    yield upright(
        thing,
        "traffic sign",
        _sign_texture(thing.style),
        z_m=-0.06,
        bottom_m=thing.height_m - thing.width_m,
    )


@lru_cache(maxsize=4)
def _signal_texture(lit: int) -> Texture:
    """A traffic light's head; `lit` 0 to 2 is red, amber, green."""
    canvas = Canvas(24, 64, (24, 26, 24), opaque=True)
    lamps = ((255, 50, 40), (255, 190, 40), (60, 255, 130))
    for lamp, color in enumerate(lamps):
        bright = color if lamp == lit else shaded(color, 0.22)
        canvas.disc(bright, 0.5, (lamp + 0.5) / 3, 0.3, 0.3 * 24 / 64)
    return canvas.texture()


def build_signal(thing: Thing) -> Iterator[Surface]:
    """Yields a pole and a traffic light's head."""
    steel = column_texture((70, 74, 72))
    yield upright(thing, "pole", steel, width_m=0.12)
    head = _signal_texture(thing.style % 3)
    yield upright(
        thing, "traffic light", head, z_m=-0.1, width_m=0.42, bottom_m=thing.height_m - 1.1
    )
