"""Textured parallelograms in space, and the few ways in which things are put together of them."""

from dataclasses import dataclass
from functools import lru_cache

import cv2

from segformer3d.labels import IGNORE_ID
from segformer3d.scenes.canvas import Canvas, Texture
from segformer3d.scenes.world import TRAIN_IDS, Point, Thing


@dataclass(frozen=True, slots=True)
class Surface:
    """A textured parallelogram: corner, and its edges along the texture's width and height.

    Attributes:
        corner: World point of the texture's top left corner.
        along: World vector of the texture's width.
        down: World vector of the texture's height.
        class_id: Train id.
        texture: What it shows.
        repeat: How often the texture repeats along the two edges.
        is_shadow: It darkens the plane that it lies in by its alpha, and has no class.
    """

    corner: Point
    along: Point
    down: Point
    class_id: int
    texture: Texture
    repeat: tuple[float, float] = (1.0, 1.0)
    is_shadow: bool = False


def upright(
    thing: Thing,
    name: str,
    texture: Texture,
    *,
    x_m: float = 0.0,
    z_m: float = 0.0,
    width_m: float | None = None,
    bottom_m: float = 0.0,
    top_m: float | None = None,
) -> Surface:
    """A surface across the road that faces the camera, at an offset from the thing's front."""
    width = thing.width_m if width_m is None else width_m
    top = thing.height_m if top_m is None else top_m
    left = thing.x_m + x_m - width / 2
    return Surface(
        corner=(left, -(thing.base_m + top), z_m),
        along=(width, 0.0, 0.0),
        down=(0.0, top - bottom_m, 0.0),
        class_id=TRAIN_IDS[name],
        texture=texture,
    )


def lengthwise(
    thing: Thing,
    name: str,
    texture: Texture,
    *,
    x_m: float,
    top_m: float | None = None,
    repeat: tuple[float, float] = (1.0, 1.0),
    is_turned: bool = False,
) -> Surface:
    """A wall along the road; the texture's left edge is at the near end unless turned."""
    top = thing.height_m if top_m is None else top_m
    start, along = (thing.length_m, -thing.length_m) if is_turned else (0.0, thing.length_m)
    return Surface(
        corner=(thing.x_m + x_m, -(thing.base_m + top), start),
        along=(0.0, 0.0, along),
        down=(0.0, top, 0.0),
        class_id=TRAIN_IDS[name],
        texture=texture,
        repeat=repeat,
    )


def slope(
    thing: Thing,
    name: str,
    texture: Texture,
    *,
    far: tuple[float, float],
    near: tuple[float, float],
) -> Surface:
    """A surface across the thing's whole width between two (height_m, z_m) edges."""
    return Surface(
        corner=(thing.x_m - thing.width_m / 2, -(thing.base_m + far[0]), far[1]),
        along=(thing.width_m, 0.0, 0.0),
        down=(0.0, far[0] - near[0], near[1] - far[1]),
        class_id=TRAIN_IDS[name],
        texture=texture,
    )


@lru_cache(maxsize=8)
def _shadow_texture(is_round: bool) -> Texture:
    """Alpha is the darkness."""
    canvas = Canvas(64, 64, (0, 0, 0), opaque=False)
    if is_round:
        canvas.disc((0, 0, 0), 0.5, 0.5, 0.4, 0.4)
    else:
        canvas.box((0, 0, 0), 0.12, 0.12, 0.88, 0.88)
    canvas.rgba[..., 3] = cv2.GaussianBlur(canvas.rgba[..., 3], (0, 0), 4)
    return canvas.texture()


def shadow(thing: Thing, *, is_round: bool, grow: float) -> Surface:
    """A dark patch on the ground that the thing stands on."""
    width, length = thing.width_m * grow, max(thing.length_m, thing.width_m) * grow
    middle = thing.length_m / 2
    return Surface(
        corner=(thing.x_m - width / 2, -thing.base_m, middle + length / 2),
        along=(width, 0.0, 0.0),
        down=(0.0, 0.0, -length),
        class_id=IGNORE_ID,
        texture=_shadow_texture(is_round),
        is_shadow=True,
    )
