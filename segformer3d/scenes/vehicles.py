"""Cars, trucks and buses."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

from segformer3d.scenes.canvas import Canvas, Texture, plain_texture, shaded
from segformer3d.scenes.surfaces import Surface, lengthwise, shadow, slope, upright
from segformer3d.scenes.world import Color, Thing


def _sides(thing: Thing, texture: Texture, *, is_turned: bool) -> Iterator[Surface]:
    for x_m in (-thing.width_m / 2, thing.width_m / 2):
        yield lengthwise(thing, thing.kind, texture, x_m=x_m, is_turned=is_turned)


@lru_cache(maxsize=64)
def _car_side_texture(color: Color) -> Texture:
    """Seen from its left: the rear is at the texture's left edge."""
    canvas = Canvas(256, 88, color, opaque=False)
    roof = [(0.03, 0.42), (0.16, 0.04), (0.5, 0.0), (0.6, 0.02), (0.76, 0.38)]
    canvas.polygon(color, *roof, (0.98, 0.46), (1.0, 0.82), (0.0, 0.82), (0.0, 0.5))
    glass = (38, 44, 52)
    canvas.polygon(glass, (0.11, 0.36), (0.19, 0.1), (0.4, 0.07), (0.4, 0.37))
    canvas.polygon(glass, (0.43, 0.37), (0.43, 0.07), (0.58, 0.08), (0.7, 0.38))
    canvas.box(shaded(color, 0.6), 0.0, 0.74, 1.0, 0.82)
    canvas.box(shaded(color, 0.7), 0.41, 0.4, 0.415, 0.74)
    canvas.box(shaded(color, 1.2), 0.02, 0.44, 0.98, 0.47)
    for x in (0.19, 0.81):
        canvas.disc((22, 22, 24), x, 0.78, 0.08, 0.22)
        canvas.disc((120, 122, 125), x, 0.78, 0.045, 0.125)
    return canvas.texture()


@lru_cache(maxsize=64)
def _car_end_texture(color: Color, is_rear: bool) -> Texture:
    """The lower face of a car's front or rear."""
    canvas = Canvas(128, 64, color, opaque=True)
    canvas.box(shaded(color, 0.55), 0, 0.72, 1, 1)
    canvas.box((20, 20, 22), 0.03, 0.88, 0.18, 1)
    canvas.box((20, 20, 22), 0.82, 0.88, 0.97, 1)
    lamp = (200, 25, 25) if is_rear else (240, 240, 225)
    canvas.box(lamp, 0.03, 0.14, 0.2, 0.42)
    canvas.box(lamp, 0.8, 0.14, 0.97, 0.42)
    if not is_rear:
        canvas.box((25, 25, 28), 0.27, 0.2, 0.73, 0.5)
    canvas.box((225, 225, 205), 0.36, 0.56, 0.64, 0.72)
    return canvas.texture()


def build_car(thing: Thing) -> Iterator[Surface]:
    """Yields body, bonnet, windows and roof; where `style` is odd, the car faces the camera."""
    is_turned = thing.style % 2 == 1
    paint = plain_texture(0, shaded(thing.color, 1.1), 1.0)
    glass = plain_texture(1, (52, 60, 70), 3.0, 8.0)
    length, belt, roof = thing.length_m, 0.62 * thing.height_m, 0.97 * thing.height_m
    bottom = 0.14 * thing.height_m

    def at(share: float) -> float:
        return (1 - share if is_turned else share) * length

    yield from _sides(thing, _car_side_texture(thing.color), is_turned=is_turned)
    near_end = _car_end_texture(thing.color, not is_turned)
    yield upright(thing, "car", near_end, bottom_m=bottom, top_m=belt)
    heights = ((0.0, belt), (0.17, roof), (0.58, roof), (0.76, belt), (1.0, belt * 0.88))
    covers = (glass, paint, glass, paint)
    for cover, edges in zip(covers, pairwise(heights), strict=True):
        (near_z, near_h), (far_z, far_h) = sorted((at(share), height) for share, height in edges)
        yield slope(thing, "car", cover, far=(far_h, far_z), near=(near_h, near_z))
    yield shadow(thing, is_round=False, grow=1.3)


@lru_cache(maxsize=64)
def _van_texture(color: Color, kind: str, side: str) -> Texture:
    """A face of a truck or bus; `side` is "side", "rear" or "front"."""
    canvas = Canvas(256 if side == "side" else 96, 112, color, opaque=side != "side")
    glass = (40, 46, 54)
    if side == "side":
        canvas.box(color, 0, 0, 1, 0.88)
        if kind == "bus":
            for window in range(7):
                canvas.box(glass, 0.03 + window * 0.138, 0.16, 0.15 + window * 0.138, 0.46)
            canvas.box(shaded(color, 1.4), 0, 0.54, 1, 0.6)
        else:
            canvas.box(shaded(color, 0.55), 0.76, 0.12, 1, 0.88)
            canvas.box(glass, 0.84, 0.2, 0.97, 0.46)
        for x in (0.14, 0.28, 0.88) if kind == "truck" else (0.18, 0.8):
            canvas.disc((20, 20, 22), x, 0.87, 0.05, 0.125)
        return canvas.texture()
    canvas.box((24, 24, 26), 0, 0.9, 1, 1)
    if side == "front" or kind == "bus":
        canvas.box(glass, 0.07, 0.12 if kind == "bus" else 0.3, 0.93, 0.55)
    else:
        canvas.box(shaded(color, 0.8), 0.49, 0.03, 0.51, 0.8)
    lamp = (205, 25, 25) if side == "rear" else (240, 240, 225)
    canvas.box(lamp, 0.04, 0.74, 0.18, 0.84)
    canvas.box(lamp, 0.82, 0.74, 0.96, 0.84)
    return canvas.texture()


def build_van(thing: Thing) -> Iterator[Surface]:
    """Yields a truck or a bus: a box; where `style` is odd, it faces the camera."""
    is_turned = thing.style % 2 == 1
    side = _van_texture(thing.color, thing.kind, "side")
    yield from _sides(thing, side, is_turned=is_turned)
    end = _van_texture(thing.color, thing.kind, "front" if is_turned else "rear")
    yield upright(thing, thing.kind, end, bottom_m=0.3)
    yield shadow(thing, is_round=False, grow=1.25)
