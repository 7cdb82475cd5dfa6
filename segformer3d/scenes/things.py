"""The kinds of things, and all surfaces that stand round the camera at one moment."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

import numpy as np

from segformer3d.scenes.buildings import build_building
from segformer3d.scenes.ground import backdrop, ground
from segformer3d.scenes.people import build_cycle, build_person, build_rider
from segformer3d.scenes.roadside import (
    build_fence,
    build_hedge,
    build_lamp,
    build_sign,
    build_signal,
    build_tree,
    build_wall,
)
from segformer3d.scenes.surfaces import Surface
from segformer3d.scenes.vehicles import build_car, build_van
from segformer3d.scenes.world import STREET_LENGTH_M, Drive, F64Array, Thing

_BEHIND_M: Final = 32.0
"""Things stay in the world until they are this far behind the camera."""

THING_KINDS: Final[dict[str, Callable[[Thing], Iterator[Surface]]]] = {
    "building": build_building,
    "tree": build_tree,
    "hedge": build_hedge,
    "fence": build_fence,
    "wall": build_wall,
    "lamp": build_lamp,
    "sign": build_sign,
    "signal": build_signal,
    "car": build_car,
    "truck": build_van,
    "bus": build_van,
    "person": build_person,
    "rider": build_rider,
    "cycle": build_cycle,
}
"""What a `Thing.kind` may be, and what draws it."""


@lru_cache(maxsize=4096)
def _surfaces_of(thing: Thing) -> tuple[Surface, ...]:
    """Returns the thing's surfaces, its front end at z = 0."""
    return tuple(THING_KINDS[thing.kind](thing))


def surfaces_at(drive: Drive, time_s: float) -> tuple[list[Surface], F64Array]:
    """Returns all surfaces near the camera, and what to add to each one's z, float64 (N,)."""
    camera_z_m = drive.speed_mps * time_s
    surfaces = [*ground(drive.street, camera_z_m), backdrop(drive, camera_z_m)]
    offsets = [0.0] * len(surfaces)
    for thing in drive.things:
        ahead_m = thing.z_m + thing.speed_mps * time_s - camera_z_m
        z_m = camera_z_m + (ahead_m + _BEHIND_M) % STREET_LENGTH_M - _BEHIND_M
        pieces = _surfaces_of(thing)
        surfaces += pieces
        offsets += [z_m] * len(pieces)
    return surfaces, np.array(offsets)
