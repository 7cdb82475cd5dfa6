"""Houses: a facade along the road, a gable wall and, on some, a roof."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from segformer3d.scenes.canvas import Canvas, Texture, shaded
from segformer3d.scenes.surfaces import Surface, lengthwise, upright
from segformer3d.scenes.world import TRAIN_IDS, Color, Thing


@lru_cache(maxsize=256)
def _facade_texture(style: int, color: Color, width_m: float, height_m: float) -> Texture:
    rng = np.random.default_rng(style)
    canvas = Canvas(min(512, round(width_m * 18)), round(height_m * 18), color, opaque=True)
    canvas.speckle(rng, 4, 0.8)
    canvas.speckle(rng, 4, 20)
    num_floors = max(1, round(height_m / 3.2))
    num_bays = max(1, round(width_m / rng.uniform(2.2, 3.6)))
    frame = shaded(color, float(rng.choice([0.7, 1.35])))
    half_width, top_share = rng.uniform(0.2, 0.36), rng.uniform(0.15, 0.28)
    for floor in range(num_floors):
        floor_top, floor_m = floor / num_floors, 1 / num_floors
        is_ground = floor == num_floors - 1
        for bay in range(num_bays):
            middle = (bay + 0.5) / num_bays
            half = half_width / num_bays
            top = floor_top + top_share * floor_m
            bottom = floor_top + (0.98 if is_ground and rng.random() < 0.4 else 0.78) * floor_m
            edge = 0.08 / width_m
            canvas.box(frame, middle - half - edge, top - edge, middle + half + edge, bottom + edge)
            glass = int(rng.integers(28, 95))
            canvas.box((glass, glass + 8, glass + 16), middle - half, top, middle + half, bottom)
            canvas.box(frame, middle - edge / 3, top, middle + edge / 3, bottom)
            if rng.random() < 0.3:
                blind = top + rng.uniform(0.2, 0.7) * (bottom - top)
                canvas.box((188, 184, 172), middle - half, top, middle + half, blind)
        if floor:
            canvas.box(shaded(color, 0.82), 0, floor_top, 1, floor_top + 0.12 / height_m)
    if style % 3 == 0:
        awning = (int(rng.integers(60, 200)), 60, int(rng.integers(40, 120)))
        canvas.box(awning, 0, 1 - 0.95 / num_floors, 1, 1 - 0.75 / num_floors)
    canvas.box(shaded(color, 0.6), 0, 1 - 0.4 / height_m, 1, 1)
    canvas.box(shaded(color, 1.15), 0, 0, 1, 0.25 / height_m)
    return canvas.texture()


@lru_cache(maxsize=256)
def _gable_texture(style: int, color: Color, eaves_share: float) -> Texture:
    """An end wall: `eaves_share` of its height is below the eaves, above it is a triangle."""
    rng = np.random.default_rng(style)
    canvas = Canvas(160, 160, shaded(color, 0.95), opaque=False)
    canvas.polygon(
        shaded(color, 0.95), (0, 1 - eaves_share), (0.5, 0), (1, 1 - eaves_share), (1, 1), (0, 1)
    )
    canvas.speckle(rng, 4, 1)
    canvas.speckle(rng, 4, 16)
    for x in (0.22, 0.62):
        if rng.random() < 0.6:
            canvas.box((55, 62, 70), x, 1 - 0.7 * eaves_share, x + 0.14, 1 - 0.45 * eaves_share)
    return canvas.texture()


@lru_cache(maxsize=32)
def _roof_texture(style: int, color: Color) -> Texture:
    canvas = Canvas(128, 64, color, opaque=True)
    for row in range(16):
        canvas.box(shaded(color, 0.75), 0, row / 16, 1, row / 16 + 0.02)
    canvas.speckle(np.random.default_rng(style), 6, 1)
    return canvas.texture()


def build_building(thing: Thing) -> Iterator[Surface]:
    """Yields facade and gable, and a roof where `style` is odd."""
    front_m = thing.inner_m
    facade = _facade_texture(thing.style, thing.color, thing.length_m, thing.height_m)
    yield lengthwise(thing, "building", facade, x_m=front_m)
    roof_m = thing.height_m * 0.32 if thing.style % 2 else 0.0
    top_m = thing.height_m + roof_m
    gable = _gable_texture(thing.style, thing.color, thing.height_m / top_m)
    yield upright(thing, "building", gable, top_m=top_m)
    if roof_m:
        tiles = _roof_texture(thing.style, (132, 74, 58) if thing.style % 4 == 1 else (82, 82, 88))
        yield Surface(
            corner=(thing.x_m, -(thing.base_m + top_m), 0.0),
            along=(0.0, 0.0, thing.length_m),
            down=(front_m, roof_m, 0.0),
            class_id=TRAIN_IDS["building"],
            texture=tiles,
            repeat=(thing.length_m / 6, 1.0),
        )
