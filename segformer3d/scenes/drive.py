"""Lays out drives: draws a street, what stands and moves on it, a light and a camera by chance."""

from collections.abc import Iterator
from typing import Final

import numpy as np

from segformer3d.scenes.canvas import shaded
from segformer3d.scenes.world import (
    KERB_M,
    STREET_LENGTH_M,
    Camera,
    Color,
    Drive,
    Light,
    Street,
    Thing,
)


def _palette(hex_colors: str) -> tuple[Color, ...]:
    """Reads colors that are written as rrggbb."""
    channels = (bytes.fromhex(color) for color in hex_colors.split())
    return tuple((red, green, blue) for red, green, blue in channels)


_DAY: Final = (1.0, 1.0, 1.0)
_LIGHTS: Final = (
    Light((0.5, -0.75, -0.43), 0.45, (86, 138, 205), (205, 218, 230), 520, 0.45, _DAY, 1.5),
    Light((-0.66, -0.6, -0.45), 0.4, (70, 125, 200), (214, 222, 228), 700, 0.3, _DAY, 1.5),
    Light((0.1, -0.98, -0.17), 0.85, (168, 176, 186), (212, 215, 218), 330, 0.75, _DAY, 2.5),
    Light(
        (-0.75, -0.3, 0.59), 0.5, (96, 110, 160), (238, 190, 140), 420, 0.5, (0.95, 0.82, 0.7), 4
    ),
    Light((0.2, -0.95, 0.24), 0.9, (188, 194, 198), (206, 210, 212), 110, 0.7, (0.95, 0.97, 1), 2),
    Light((0.0, -1.0, 0.0), 0.9, (120, 128, 138), (160, 166, 172), 180, 0.8, (0.62, 0.66, 0.7), 5),
)
"""Clear afternoon and morning, overcast, dusk, haze, rain."""

_PLASTER: Final = _palette("baaa94 a45c4a c9c0b0 96928e b29470 806e62 cdb48c 7a848e b07860")
_PAINTS: Final = _palette("1e2024 cdd0d2 8e9296 80181c 1e3468 52585e e6e6e4 304a3e b09660 3e5c84")
_CLOTHES: Final = _palette("282c3c 96282c 3c6096 cdc8be 4a5c3c d2a032 603c60 1e1e20")
_LEAVES: Final = _palette("4a682a 607a32 3c582c 7e7c36 586e42")


def _pick(rng: np.random.Generator, colors: tuple[Color, ...]) -> Color:
    return shaded(colors[int(rng.integers(len(colors)))], float(rng.uniform(0.85, 1.15)))


def _style(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 16))


def _garden_edge(
    rng: np.random.Generator, side: int, x_m: float, z_m: float, length_m: float
) -> Thing:
    kind = str(rng.choice(["hedge", "fence", "wall"]))
    colors = {"hedge": _LEAVES, "fence": ((52, 58, 56), (196, 196, 190)), "wall": _PLASTER}
    return Thing(
        kind,
        x_m=side * (x_m + 0.35),
        z_m=z_m,
        width_m=0.5,
        height_m=float(rng.uniform(0.8, 1.7)),
        length_m=length_m,
        color=_pick(rng, colors[kind]),
        base_m=KERB_M,
        style=_style(rng),
    )


def _tree(rng: np.random.Generator, x_m: float, z_m: float) -> Thing:
    height_m = float(rng.uniform(5.0, 11.0))
    return Thing(
        "tree",
        x_m=x_m,
        z_m=z_m,
        width_m=height_m * float(rng.uniform(0.5, 0.75)),
        height_m=height_m,
        color=_LEAVES[int(rng.integers(len(_LEAVES)))],
        base_m=KERB_M,
        style=_style(rng),
    )


def _houses(rng: np.random.Generator, street: Street, side: int) -> Iterator[Thing]:
    """Yields one side's buildings with the gardens before and the trees between them."""
    edge_m = street.edge_m
    floors = float(rng.uniform(1.5, 4.5))
    z_m = 0.0
    while z_m < STREET_LENGTH_M - 8:
        length_m = min(round(float(rng.uniform(8, 24))), STREET_LENGTH_M - z_m)
        if rng.random() < 0.2:
            yield _garden_edge(rng, side, edge_m, z_m, length_m)
            for _ in range(int(rng.integers(1, 4))):
                x_m = side * (edge_m + rng.uniform(2.5, 9.0))
                yield _tree(rng, float(x_m), z_m + float(rng.uniform(0, length_m)))
        else:
            setback_m = float(rng.choice([0.0, 0.0, 3.0, 5.5]))
            depth_m = 11.0
            yield Thing(
                "building",
                x_m=side * (edge_m + setback_m + depth_m / 2),
                z_m=z_m,
                width_m=depth_m,
                height_m=3.2 * max(1, round(floors + rng.normal(0, 1))) + 0.4,
                length_m=length_m,
                color=_pick(rng, _PLASTER),
                base_m=KERB_M,
                style=_style(rng),
            )
            if setback_m:
                yield _garden_edge(rng, side, edge_m, z_m, length_m)
        z_m += length_m + (float(rng.uniform(2, 8)) if rng.random() < 0.35 else 0.0)


def _furniture(rng: np.random.Generator, street: Street, side: int) -> Iterator[Thing]:
    """Yields lamps, street trees, signs and traffic lights along one kerb."""
    kerb_m = side * (street.half_m + 0.5)
    pole_color = shaded((110, 114, 116), float(rng.uniform(0.4, 1.2)))
    lamp_m = float(rng.uniform(5.5, 9.0))
    for z_m in np.arange(8.0 + 15 * (side > 0), STREET_LENGTH_M, 30.0):
        yield Thing("lamp", kerb_m, float(z_m), 0.16, lamp_m, color=pole_color, base_m=KERB_M)
    spacing_m = float(rng.choice([9.0, 14.0, 22.0, 60.0]))
    for z_m in np.arange(2.0, STREET_LENGTH_M, spacing_m):
        if rng.random() < 0.75:
            yield _tree(rng, side * (street.half_m + 1.0), float(z_m + rng.uniform(0, 4)))
    for _ in range(9):
        z_m, size_m = rng.uniform(0, STREET_LENGTH_M), rng.uniform(0.6, 1.0)
        height_m = float(rng.uniform(2.5, 3.3))
        yield Thing(
            "sign", kerb_m, float(z_m), float(size_m), height_m, base_m=KERB_M, style=_style(rng)
        )
    for z_m in np.arange(22.0, STREET_LENGTH_M, 40.0):
        lit = street.style + int(z_m)
        yield Thing("signal", kerb_m, float(z_m), 0.3, 3.6, base_m=KERB_M, style=lit)


def _vehicle(
    rng: np.random.Generator, x_m: float, z_m: float, *, speed_mps: float, is_turned: bool
) -> Thing:
    kind = str(rng.choice(["car"] * 8 + ["truck", "bus"]))
    shapes = {"car": (1.8, 1.48, 4.3), "truck": (2.4, 3.2, 8.0), "bus": (2.5, 3.1, 11.5)}
    width_m, height_m, length_m = shapes[kind]
    size = float(rng.uniform(0.93, 1.08))
    return Thing(
        kind,
        x_m=x_m,
        z_m=z_m,
        width_m=width_m * size,
        height_m=height_m * float(rng.uniform(0.93, 1.15)),
        length_m=length_m * size,
        color=_pick(rng, _PAINTS),
        speed_mps=speed_mps,
        style=2 * _style(rng) + is_turned,
    )


def _traffic(rng: np.random.Generator, street: Street, speed_mps: float) -> Iterator[Thing]:
    """Yields moving vehicles: all of one lane go at one speed, those ahead at the camera's."""
    for lane in range(street.num_lanes):
        x_m = (lane + 0.5) * street.lane_m
        oncoming_mps = -float(rng.uniform(6, 14))
        for z_m in np.arange(14, STREET_LENGTH_M - 20, float(rng.uniform(24, 60))):
            gap_m = float(z_m + rng.uniform(0, 8))
            yield _vehicle(rng, -x_m, gap_m, speed_mps=oncoming_mps, is_turned=True)
        for z_m in np.arange(rng.uniform(12, 40), 150, float(rng.uniform(22, 60))):
            yield _vehicle(rng, x_m, float(z_m), speed_mps=speed_mps, is_turned=False)


def _parked(rng: np.random.Generator, street: Street, side: int) -> Iterator[Thing]:
    x_m = side * (street.half_m - 1.1)
    density = float(rng.uniform(0.2, 0.85))
    for z_m in np.arange(0.0, STREET_LENGTH_M - 12, 13.0 if side > 0 else 12.0):
        if rng.random() < density:
            z = float(z_m + rng.uniform(0, 1))
            yield _vehicle(rng, x_m, z, speed_mps=0.0, is_turned=side < 0)


def _people(rng: np.random.Generator, street: Street, side: int) -> Iterator[Thing]:
    """Yields walkers and parked cycles on the pavement, and riders along the parked cars."""
    for _ in range(int(rng.integers(5, 16))):
        x_m = side * (street.walk_m + rng.uniform(0.5, max(0.8, street.pavement_m - 0.4)))
        height_m = float(rng.uniform(1.5, 1.9) if rng.random() < 0.9 else rng.uniform(0.9, 1.3))
        yield Thing(
            "person",
            x_m=float(x_m),
            z_m=float(rng.uniform(0, STREET_LENGTH_M)),
            width_m=0.36 * height_m,
            height_m=height_m,
            color=_pick(rng, _CLOTHES),
            base_m=KERB_M,
            speed_mps=float(rng.normal(0, 0.9)),
            style=_style(rng),
        )
    for _ in range(int(rng.integers(3, 12))):
        yield Thing(
            "cycle",
            x_m=side * (street.walk_m + float(rng.uniform(0.9, 1.2))),
            z_m=float(rng.uniform(0, STREET_LENGTH_M)),
            width_m=float(rng.uniform(1.6, 1.85)),
            height_m=float(rng.uniform(1.0, 1.15)),
            color=_pick(rng, _PAINTS),
            base_m=KERB_M,
            style=_style(rng),
        )
    for _ in range(int(rng.integers(3, 8))):
        yield Thing(
            "rider",
            x_m=side * (street.half_m - street.parking_m - 0.1),
            z_m=float(rng.uniform(0, STREET_LENGTH_M)),
            width_m=0.62,
            height_m=float(rng.uniform(1.6, 1.85)),
            color=_pick(rng, _CLOTHES),
            speed_mps=side * 5.0,
            style=_style(rng),
        )


def _make_street(rng: np.random.Generator) -> Street:
    return Street(
        num_lanes=int(rng.choice([1, 1, 2])),
        lane_m=float(rng.uniform(3.1, 3.5)),
        parking_m=float(rng.uniform(2.2, 2.6)),
        pavement_m=float(rng.uniform(2.0, 4.5)),
        style=_style(rng),
        verge_m=float(rng.uniform(0.8, 2.0)) if rng.random() < 0.35 else 0.0,
    )


def _make_camera(rng: np.random.Generator, street: Street) -> Camera:
    return Camera(
        x_m=street.lane_m * (float(rng.integers(street.num_lanes)) + 0.5),
        height_m=float(rng.uniform(1.25, 1.65)),
        pitch_rad=float(rng.uniform(-0.02, 0.09)),
        focal_widths=float(rng.uniform(0.8, 0.95)),
        sway=float(rng.uniform(0.3, 1.0)),
        bonnet=float(rng.choice([0.0, 0.0, 0.06, 0.1])),
    )


def make_drive(seed: int) -> Drive:
    """Lays out a street, its traffic, its light and a camera. One seed, one drive.

    Args:
        seed: 0 or more.

    Returns:
        A drive that can be rendered at any time; it repeats its street, so it never ends.
    """
    rng = np.random.default_rng(seed)
    street = _make_street(rng)
    speed_mps = float(rng.uniform(6.0, 14.0))
    things = list(_traffic(rng, street, speed_mps))
    for side in (-1, 1):
        for place in (_houses, _furniture, _parked, _people):
            things += place(rng, street, side)
    return Drive(
        seed=seed,
        speed_mps=speed_mps,
        camera=_make_camera(rng, street),
        light=_LIGHTS[int(rng.integers(len(_LIGHTS)))],
        street=street,
        things=tuple(things),
    )
