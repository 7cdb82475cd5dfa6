"""The ground and what ends it: road, kerbs, pavements, the land beyond, a far line of trees."""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Final

import numpy as np

from segformer3d.scenes.canvas import Canvas, Texture, plain_texture, seamless_noise
from segformer3d.scenes.surfaces import Surface
from segformer3d.scenes.world import KERB_M, TRAIN_IDS, Drive, Street

GROUND_PERIOD_M: Final = 12.0
"""The road's and the pavement's textures repeat after this length."""
HORIZON_M: Final = 3000.0
"""How far the ground reaches ahead of the camera, to within a period."""
BACKDROP_M: Final = 400.0
"""Distance of the far line of trees or roofs."""


@lru_cache(maxsize=64)
def _road_texture(street: Street) -> Texture:
    """Asphalt with the lanes' marks: one `GROUND_PERIOD_M` of the whole road's width."""
    rng = np.random.default_rng(street.style)
    grey = int(rng.integers(98, 138))
    width_m = 2 * street.half_m
    canvas = Canvas(round(width_m * 24), 288, (grey, grey, grey + 3), opaque=True)
    canvas.speckle(rng, 7, 0.7)
    canvas.speckle(rng, 4, 14)
    if rng.random() < 0.5:
        left, top = rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.6)
        canvas.box((grey - 18,) * 3, left, top, left + 0.15, top + 0.3)
    paint = (222, 222, 215)
    dashes = ((0.1, 0.35), (0.6, 0.85))
    for lane in range(-street.num_lanes, street.num_lanes + 1):
        middle = 0.5 + lane * street.lane_m / width_m
        half = 0.07 / width_m
        solid = abs(lane) == street.num_lanes or (lane == 0 and street.style % 3 == 0)
        for top, bottom in ((0.0, 1.0),) if solid else dashes:
            canvas.box(paint, middle - half, top, middle + half, bottom)
    canvas.speckle(rng, 5, 1.5)
    return canvas.texture()


@lru_cache(maxsize=64)
def _pavement_texture(style: int) -> Texture:
    rng = np.random.default_rng(style)
    grey = int(rng.integers(125, 170))
    canvas = Canvas(96, 288, (grey + 6, grey, grey - 6), opaque=True)
    canvas.speckle(rng, 5, 8)
    for row in range(12):
        canvas.box((grey - 35,) * 3, 0, row / 12, 1, row / 12 + 0.004)
    for column in range(3):
        canvas.box((grey - 35,) * 3, column / 3, 0, column / 3 + 0.012, 1)
    canvas.speckle(rng, 5, 0.8)
    return canvas.texture()


@lru_cache(maxsize=32)
def _backdrop_texture(style: int) -> Texture:
    """The far end of the world: a line of trees or of roofs against the sky."""
    rng = np.random.default_rng(style)
    canvas = Canvas(1024, 64, (88, 100, 78), opaque=False)
    if style % 2:
        hills, trees = (seamless_noise(rng, (1, 1024), sigma)[0] for sigma in (40.0, 4.0))
        top = 0.62 + 0.12 * hills + 0.04 * trees
    else:
        canvas.rgba[..., :3] = (116, 112, 110)
        top = np.repeat(rng.uniform(0.25, 0.85, 64), 16)
    rows = (np.arange(64) + 0.5)[:, None] / 64
    canvas.rgba[..., 3] = np.where(rows > top, 255, 0)
    canvas.speckle(rng, 8, 1.5)
    return canvas.texture()


def _level(
    left_m: float,
    right_m: float,
    height_m: float,
    near_m: float,
    far_m: float,
    *,
    name: str,
    texture: Texture,
    period_m: float | None = None,
) -> Surface:
    """A level piece of ground; textures repeat along the road, and across if `period_m` is set."""
    across = 1.0 if period_m is None else (right_m - left_m) / period_m
    return Surface(
        corner=(left_m, -height_m, far_m),
        along=(right_m - left_m, 0.0, 0.0),
        down=(0.0, 0.0, near_m - far_m),
        class_id=TRAIN_IDS[name],
        texture=texture,
        repeat=(across, (far_m - near_m) / (period_m or GROUND_PERIOD_M)),
    )


def ground(street: Street, camera_z_m: float) -> Iterator[Surface]:
    """Yields road, kerbs, pavements and the land beyond, in pieces that grow with distance."""
    road = _road_texture(street)
    pavement = _pavement_texture(street.style)
    grass = plain_texture(street.style % 8, (92, 112, 58), 9)
    stone = plain_texture(street.style % 8, (168, 166, 160), 5)
    start = math.floor(camera_z_m / GROUND_PERIOD_M) * GROUND_PERIOD_M
    kerb, walk, edge = street.half_m, street.walk_m, street.edge_m
    steps = (0, 1, 2, 4, 8, 16, 32, HORIZON_M / GROUND_PERIOD_M)
    for first, last in pairwise(steps):
        near, far = start + first * GROUND_PERIOD_M, start + last * GROUND_PERIOD_M
        yield _level(-kerb, kerb, 0.0, near, far, name="road", texture=road)
        for side in (-1, 1):
            left, right = sorted((side * walk, side * edge))
            yield _level(left, right, KERB_M, near, far, name="sidewalk", texture=pavement)
            for inner, outer in ((kerb, walk), (edge, 800.0)):
                if inner == outer:
                    continue
                left, right = sorted((side * inner, side * outer))
                yield _level(
                    left, right, KERB_M, near, far, name="terrain", texture=grass, period_m=4.0
                )
            yield Surface(
                corner=(side * kerb, -KERB_M, near),
                along=(0.0, 0.0, far - near),
                down=(0.0, KERB_M, 0.0),
                class_id=TRAIN_IDS["sidewalk"],
                texture=stone,
                repeat=((far - near) / 2, 1.0),
            )


def backdrop(drive: Drive, camera_z_m: float) -> Surface:
    """A far line of trees or roofs that keeps its distance from the camera."""
    name = "vegetation" if drive.street.style % 2 else "building"
    return Surface(
        corner=(-900.0, -26.0, camera_z_m + BACKDROP_M),
        along=(1800.0, 0.0, 0.0),
        down=(0.0, 26.0, 0.0),
        class_id=TRAIN_IDS[name],
        texture=_backdrop_texture(drive.street.style),
    )
