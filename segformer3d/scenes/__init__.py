"""Synthetic street scenes with exact class ids and exact metric depth, for tests and demos.

`make_drive(seed)` lays out a street, its traffic, its light and a camera; `render` draws one frame
of the drive. Everything is a textured parallelogram in space, drawn with a z-buffer. Only numpy
and cv2.
"""

from segformer3d.scenes.canvas import Canvas, Texture
from segformer3d.scenes.drive import make_drive
from segformer3d.scenes.ground import BACKDROP_M, GROUND_PERIOD_M, HORIZON_M
from segformer3d.scenes.projection import NEAR_M
from segformer3d.scenes.renderer import render
from segformer3d.scenes.surfaces import Surface
from segformer3d.scenes.things import THING_KINDS
from segformer3d.scenes.world import (
    KERB_M,
    STREET_LENGTH_M,
    Camera,
    Color,
    Drive,
    Light,
    Point,
    Scene,
    Street,
    Thing,
)

__all__ = [
    "BACKDROP_M",
    "GROUND_PERIOD_M",
    "HORIZON_M",
    "KERB_M",
    "NEAR_M",
    "STREET_LENGTH_M",
    "THING_KINDS",
    "Camera",
    "Canvas",
    "Color",
    "Drive",
    "Light",
    "Point",
    "Scene",
    "Street",
    "Surface",
    "Texture",
    "Thing",
    "make_drive",
    "render",
]
