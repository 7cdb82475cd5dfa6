"""Walkers, riders with their bicycles and motorcycles, and such that are parked."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import numpy as np

from segformer3d.scenes.canvas import Canvas, Texture, shaded
from segformer3d.scenes.surfaces import Surface, shadow, upright
from segformer3d.scenes.world import Color, Thing

_SKINS: Final = ((236, 196, 168), (200, 152, 118), (140, 98, 70), (92, 62, 46))


@lru_cache(maxsize=128)
def _person_texture(style: int, color: Color) -> Texture:
    rng = np.random.default_rng(style)
    skin = _SKINS[int(rng.integers(len(_SKINS)))]
    trousers = shaded((60, 65, 90), float(rng.uniform(0.4, 1.6)))
    stride = float(rng.uniform(0.02, 0.2))
    canvas = Canvas(64, 160, color, opaque=False)
    canvas.polygon(trousers, (0.32, 0.5), (0.55, 0.5), (0.45 - stride, 0.97), (0.3 - stride, 0.97))
    canvas.polygon(trousers, (0.45, 0.5), (0.7, 0.5), (0.72 + stride, 0.97), (0.57 + stride, 0.97))
    canvas.box((30, 28, 28), 0.27 - stride, 0.96, 0.48 - stride, 1.0)
    canvas.box((30, 28, 28), 0.56 + stride, 0.96, 0.77 + stride, 1.0)
    canvas.polygon(color, (0.28, 0.18), (0.72, 0.18), (0.74, 0.55), (0.28, 0.55))
    canvas.polygon(shaded(color, 0.8), (0.3, 0.19), (0.2, 0.22), (0.12, 0.5), (0.24, 0.51))
    canvas.polygon(shaded(color, 0.8), (0.7, 0.19), (0.8, 0.22), (0.88, 0.5), (0.76, 0.51))
    canvas.disc(skin, 0.18, 0.52, 0.06, 0.025)
    canvas.disc(skin, 0.82, 0.52, 0.06, 0.025)
    canvas.box(skin, 0.44, 0.13, 0.56, 0.19)
    canvas.disc(skin, 0.5, 0.085, 0.14, 0.075)
    canvas.disc(shaded((90, 70, 50), float(rng.uniform(0.2, 1.2))), 0.5, 0.055, 0.15, 0.055)
    canvas.speckle(rng, 5, 1.5)
    return canvas.texture()


def build_person(thing: Thing) -> Iterator[Surface]:
    """Yields a walker and the shadow."""
    yield upright(thing, "person", _person_texture(thing.style, thing.color))
    yield shadow(thing, is_round=True, grow=1.5)


@lru_cache(maxsize=64)
def _rider_texture(style: int, color: Color) -> Texture:
    """A rider from behind or from the front: the part above the saddle and the legs."""
    rng = np.random.default_rng(style)
    canvas = Canvas(64, 128, color, opaque=False)
    canvas.polygon((50, 52, 66), (0.3, 0.5), (0.48, 0.5), (0.44, 0.9), (0.24, 0.9))
    canvas.polygon((50, 52, 66), (0.52, 0.5), (0.7, 0.5), (0.76, 0.8), (0.56, 0.8))
    canvas.polygon(color, (0.28, 0.2), (0.72, 0.2), (0.68, 0.58), (0.32, 0.58))
    canvas.polygon(shaded(color, 0.85), (0.3, 0.2), (0.1, 0.48), (0.2, 0.5), (0.38, 0.3))
    canvas.polygon(shaded(color, 0.85), (0.7, 0.2), (0.9, 0.48), (0.8, 0.5), (0.62, 0.3))
    canvas.disc(_SKINS[int(rng.integers(len(_SKINS)))], 0.5, 0.12, 0.13, 0.085)
    canvas.disc(shaded(color, 0.5), 0.5, 0.08, 0.16, 0.075)
    return canvas.texture()


@lru_cache(maxsize=8)
def _cycle_texture(is_motor: bool) -> Texture:
    canvas = Canvas(64, 96, (30, 30, 34), opaque=False)
    half = 0.16 if is_motor else 0.07
    canvas.box((24, 24, 26), 0.5 - half, 0.25, 0.5 + half, 1.0)
    canvas.box((70, 72, 78), 0.08, 0.1, 0.92, 0.16)
    if is_motor:
        canvas.polygon((120, 25, 30), (0.2, 0.2), (0.8, 0.2), (0.7, 0.65), (0.3, 0.65))
    canvas.box((210, 40, 35), 0.42, 0.28, 0.58, 0.36)
    return canvas.texture()


def build_rider(thing: Thing) -> Iterator[Surface]:
    """Yields a rider with a bicycle, or with a motorcycle where `style` is even."""
    is_motor = thing.style % 2 == 0
    rider = _rider_texture(thing.style, thing.color)
    cycle = _cycle_texture(is_motor)
    yield upright(thing, "rider", rider, bottom_m=0.25)
    name = "motorcycle" if is_motor else "bicycle"
    yield upright(thing, name, cycle, z_m=-0.3, top_m=0.62 * thing.height_m)
    yield shadow(thing, is_round=True, grow=1.6)


@lru_cache(maxsize=64)
def _parked_cycle_texture(is_motor: bool, color: Color) -> Texture:
    """A bicycle or a motorcycle from its side."""
    canvas = Canvas(128, 80, (30, 30, 34), opaque=False)
    tyre, hub = (26, 26, 28), (96, 98, 102)
    for x in (0.2, 0.8):
        canvas.disc(tyre, x, 0.68, 0.19, 0.31)
        canvas.disc(hub, x, 0.68, 0.13 if not is_motor else 0.09, 0.21 if not is_motor else 0.15)
    if is_motor:
        canvas.polygon(color, (0.16, 0.5), (0.3, 0.22), (0.62, 0.26), (0.78, 0.6), (0.4, 0.8))
        canvas.polygon((30, 28, 28), (0.4, 0.2), (0.74, 0.2), (0.78, 0.32), (0.42, 0.32))
        canvas.polygon((170, 172, 176), (0.4, 0.6), (0.64, 0.6), (0.6, 0.86), (0.42, 0.86))
        canvas.polygon((60, 62, 66), (0.2, 0.66), (0.16, 0.66), (0.28, 0.04), (0.34, 0.06))
    else:
        for start, end in (
            ((0.2, 0.68), (0.32, 0.26)),
            ((0.32, 0.26), (0.66, 0.3)),
            ((0.66, 0.3), (0.8, 0.68)),
            ((0.5, 0.7), (0.64, 0.16)),
            ((0.32, 0.3), (0.5, 0.7)),
            ((0.3, 0.08), (0.34, 0.28)),
        ):
            (x0, y0), (x1, y1) = start, end
            canvas.polygon(
                color, (x0 - 0.016, y0), (x0 + 0.016, y0), (x1 + 0.016, y1), (x1 - 0.016, y1)
            )
        canvas.box((24, 22, 22), 0.56, 0.1, 0.74, 0.17)
        canvas.box((24, 22, 22), 0.22, 0.05, 0.38, 0.1)
    return canvas.texture()


def build_cycle(thing: Thing) -> Iterator[Surface]:
    """Yields a parked bicycle across the pavement, or a motorcycle where `style` is even."""
    is_motor = thing.style % 2 == 0
    name = "motorcycle" if is_motor else "bicycle"
    yield upright(thing, name, _parked_cycle_texture(is_motor, thing.color))
    yield shadow(thing, is_round=True, grow=1.1)
