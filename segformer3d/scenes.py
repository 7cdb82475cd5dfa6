"""Synthetic street scenes with exact class ids and exact metric depth, for tests and demos.

`make_drive(seed)` lays out a street, its traffic, its light and a camera; `render` draws one frame
of the drive. Everything is a textured parallelogram in space, drawn with a z-buffer: for a pinhole
camera the inverse depth of a plane is linear in the picture (Heckbert, "Fundamentals of Texture
Mapping and Image Warping", 1989), so depth is exact at every pixel centre. Only numpy and cv2.

Space: x right, y down, z forward along the road, metres, the road's surface at y = 0.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from segformer3d.labels import CLASSES, IGNORE_ID

U8Array = npt.NDArray[np.uint8]
F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Color = tuple[int, int, int]
Point = tuple[float, float, float]

STREET_LENGTH_M: Final = 240.0
"""The street repeats itself after this length, so a drive never ends."""
NEAR_M: Final = 0.5
HORIZON_M: Final = 3000.0
BACKDROP_M: Final = 400.0
GROUND_PERIOD_M: Final = 12.0
KERB_M: Final = 0.12

_BEHIND_M: Final = 32.0
_TURN: Final = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE: Final = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
_NUM_CROWNS: Final = 8
_ID: Final = {entry.name: entry.train_id for entry in CLASSES}


class Scene(NamedTuple):
    """One rendered frame.

    Attributes:
        frame: uint8 (H, W, 3), RGB.
        class_ids: uint8 (H, W), Cityscapes train ids; 255 on the camera car's own bonnet.
        depth_m: float32 (H, W), metres along the optical axis; 0 is invalid: sky and bonnet.
    """

    frame: U8Array
    class_ids: U8Array
    depth_m: F32Array


@dataclass(frozen=True, slots=True)
class Camera:
    """A pinhole camera behind the windscreen; pixel (0, 0) has its centre at u = 0, v = 0.

    The principal point is the middle of the picture, ((W - 1) / 2, (H - 1) / 2).

    Attributes:
        x_m: Distance to the right of the road's middle.
        height_m: Height above the road.
        pitch_rad: Rotation downwards.
        focal_widths: Focal length in picture widths.
        sway: Strength of the car's movements on its springs; 0 holds the camera still.
        bonnet: Share of the picture's height covered by the car's own bonnet.
    """

    x_m: float
    height_m: float
    pitch_rad: float
    focal_widths: float
    sway: float
    bonnet: float


@dataclass(frozen=True, slots=True)
class Light:
    """Sun, sky, air and sensor of a drive.

    Attributes:
        sun: Unit vector from the ground to the sun; its y is negative: up.
        ambient: Share of the light that has no direction, 0 to 1.
        zenith: RGB of the sky overhead.
        horizon: RGB of the sky at the horizon, and of the haze.
        haze_m: Distance at which 63% of a thing's colour has become haze.
        clouds: Cover, 0 to 1.
        gain: RGB factors of the sensor.
        noise: Standard deviation of the sensor's noise, grey levels.
    """

    sun: Point
    ambient: float
    zenith: Color
    horizon: Color
    haze_m: float
    clouds: float
    gain: tuple[float, float, float]
    noise: float


@dataclass(frozen=True, slots=True)
class Street:
    """The ground's cross-section, the same on both sides of the middle.

    Attributes:
        num_lanes: Lanes of one direction.
        lane_m: Width of a lane.
        parking_m: Width of the strip for parked cars.
        pavement_m: Width of the pavement.
        style: Seed of the surfaces' textures.
    """

    num_lanes: int
    lane_m: float
    parking_m: float
    pavement_m: float
    style: int

    @property
    def half_m(self) -> float:
        """Distance from the road's middle to its kerb."""
        return self.num_lanes * self.lane_m + self.parking_m


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of the world, upright on the ground.

    Attributes:
        kind: Which builder draws it: a key of `THING_KINDS`.
        x_m: Its middle, to the right of the road's middle.
        z_m: Its front end, along the road, at time 0.
        width_m: Extent across the road.
        height_m: Extent upwards.
        length_m: Extent along the road.
        color: RGB of its paint.
        base_m: Height of the ground it stands on.
        speed_mps: Speed along the road; negative comes towards the camera.
        style: Seed of its texture.
    """

    kind: str
    x_m: float
    z_m: float
    width_m: float
    height_m: float
    length_m: float = 0.0
    color: Color = (128, 128, 128)
    base_m: float = 0.0
    speed_mps: float = 0.0
    style: int = 0


@dataclass(frozen=True, slots=True)
class Drive:
    """Everything that a drive's frames are drawn from.

    Attributes:
        seed: Seed of the sensor's noise and of the sky.
        speed_mps: The camera's speed.
        camera: The camera.
        light: Sun, sky and air.
        street: The ground.
        things: All objects of one `STREET_LENGTH_M` of street.
    """

    seed: int
    speed_mps: float
    camera: Camera
    light: Light
    street: Street
    things: tuple[Thing, ...]


class Texture(NamedTuple):
    """RGBA pictures uint8 (h, w, 4), each half the size of the one before; alpha cuts out."""

    levels: tuple[U8Array, ...]
    cutout: bool


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


class Canvas:
    """An RGBA picture to paint on, in fractions of its width and height from the top left."""

    def __init__(self, width_px: int, height_px: int, color: Color, *, opaque: bool) -> None:
        self.rgba = np.full((height_px, width_px, 4), (*color, 255 * opaque), np.uint8)

    def _points(self, points: npt.ArrayLike) -> npt.NDArray[np.int32]:
        height_px, width_px = self.rgba.shape[:2]
        scaled = np.asarray(points) * (width_px, height_px) * 16 - 8
        return np.rint(scaled).astype(np.int32)

    def polygon(self, color: Color, *points: tuple[float, float]) -> None:
        """Fills a polygon."""
        cv2.fillPoly(self.rgba, [self._points(points)], (*color, 255), shift=4)

    def box(self, color: Color, left: float, top: float, right: float, bottom: float) -> None:
        """Fills an upright rectangle."""
        self.polygon(color, (left, top), (right, top), (right, bottom), (left, bottom))

    def disc(self, color: Color, x: float, y: float, radius_x: float, radius_y: float) -> None:
        """Fills an ellipse."""
        ring = _CIRCLE * (radius_x, radius_y) + (x, y)
        cv2.fillPoly(self.rgba, [self._points(ring)], (*color, 255), shift=4)

    def speckle(self, rng: np.random.Generator, strength: float, sigma_px: float) -> None:
        """Adds grey noise of a standard deviation and a grain size."""
        noise = _noise(rng, self.rgba.shape[:2], sigma_px)[..., None] * strength
        self.rgba[..., :3] = np.clip(self.rgba[..., :3] + noise, 0, 255)

    def light_from_above(self, bottom: float) -> None:
        """Darkens towards the lower edge, down to a factor."""
        factor = np.linspace(1.1, bottom, len(self.rgba), dtype=np.float32)[:, None, None]
        self.rgba[..., :3] = np.clip(self.rgba[..., :3] * factor, 0, 255)

    def texture(self) -> Texture:
        """Returns the picture with its smaller versions."""
        levels = [self.rgba]
        while min(levels[-1].shape[:2]) > 3:
            height_px, width_px = levels[-1].shape[:2]
            size = (width_px // 2, height_px // 2)
            levels.append(cv2.resize(levels[-1], size, interpolation=cv2.INTER_AREA))
        return Texture(tuple(levels), cutout=bool((self.rgba[..., 3] < 255).any()))


def _noise(rng: np.random.Generator, shape: tuple[int, ...], sigma_px: float) -> F32Array:
    """Returns noise (h, w) of mean 0 and deviation 1 that repeats without a seam."""
    if sigma_px > 6:
        small = _noise(rng, tuple(math.ceil(side / 4) for side in shape), sigma_px / 4)
        return np.asarray(cv2.resize(small, shape[::-1], interpolation=cv2.INTER_LINEAR))
    margin = math.ceil(3 * sigma_px)
    white = rng.standard_normal(shape, dtype=np.float32)
    padded = np.pad(white, margin, mode="wrap")
    smooth = cv2.GaussianBlur(padded, (0, 0), sigma_px)
    inner = smooth[margin : margin + shape[0], margin : margin + shape[1]]
    return np.asarray((inner - inner.mean()) / (inner.std() + 1e-6), dtype=np.float32)


def _shaded(color: Color, factor: float) -> Color:
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in color)
    return red, green, blue


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


@lru_cache(maxsize=64)
def _plain_texture(style: int, color: Color, strength: float, sigma_px: float = 1.2) -> Texture:
    """A seamless square of one colour with two grains of noise."""
    rng = np.random.default_rng(style)
    canvas = Canvas(128, 128, color, opaque=True)
    canvas.speckle(rng, strength, sigma_px)
    canvas.speckle(rng, strength, 6 * sigma_px)
    return canvas.texture()


@lru_cache(maxsize=256)
def _facade_texture(style: int, color: Color, width_m: float, height_m: float) -> Texture:
    rng = np.random.default_rng(style)
    canvas = Canvas(min(512, round(width_m * 18)), round(height_m * 18), color, opaque=True)
    canvas.speckle(rng, 4, 0.8)
    canvas.speckle(rng, 4, 20)
    num_floors = max(1, round(height_m / 3.2))
    num_bays = max(1, round(width_m / rng.uniform(2.2, 3.6)))
    frame = _shaded(color, float(rng.choice([0.7, 1.35])))
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
            canvas.box(_shaded(color, 0.82), 0, floor_top, 1, floor_top + 0.12 / height_m)
    if style % 3 == 0:
        awning = _shaded((int(rng.integers(60, 200)), 60, int(rng.integers(40, 120))), 1.0)
        canvas.box(awning, 0, 1 - 0.95 / num_floors, 1, 1 - 0.75 / num_floors)
    canvas.box(_shaded(color, 0.6), 0, 1 - 0.4 / height_m, 1, 1)
    canvas.box(_shaded(color, 1.15), 0, 0, 1, 0.25 / height_m)
    return canvas.texture()


@lru_cache(maxsize=256)
def _gable_texture(style: int, color: Color, eaves_share: float) -> Texture:
    """An end wall: `eaves_share` of its height is below the eaves, above it is a triangle."""
    rng = np.random.default_rng(style)
    canvas = Canvas(160, 160, _shaded(color, 0.95), opaque=False)
    canvas.polygon(
        _shaded(color, 0.95), (0, 1 - eaves_share), (0.5, 0), (1, 1 - eaves_share), (1, 1), (0, 1)
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
        canvas.box(_shaded(color, 0.75), 0, row / 16, 1, row / 16 + 0.02)
    canvas.speckle(np.random.default_rng(style), 6, 1)
    return canvas.texture()


@lru_cache(maxsize=64)
def _leaf_texture(style: int, color: Color) -> Texture:
    """A crown of leaves: clumps lit from above, with holes at the rim."""
    rng = np.random.default_rng(style)
    canvas = Canvas(128, 128, _shaded(color, 0.6), opaque=False)
    for _ in range(110):
        angle, distance = rng.uniform(0, 2 * np.pi), 0.36 * np.sqrt(rng.random())
        x = 0.5 + distance * np.cos(angle) * 1.05
        y = 0.48 + distance * np.sin(angle) * 1.05
        light = 1.25 - 0.9 * y + rng.normal(0, 0.1)
        radius = rng.uniform(0.05, 0.13)
        canvas.disc(_shaded(color, light), x, y, radius, radius)
    canvas.speckle(rng, 14, 1.3)
    alpha = canvas.rgba[..., 3].astype(np.float32)
    rim = cv2.GaussianBlur(alpha, (0, 0), 4) + 24 * _noise(rng, alpha.shape, 1.6)
    canvas.rgba[..., 3] = np.where(rim > 120, 255, 0)
    return canvas.texture()


@lru_cache(maxsize=64)
def _column_texture(color: Color) -> Texture:
    """A round pole, lit from one side."""
    canvas = Canvas(16, 16, color, opaque=True)
    for column, factor in enumerate(np.sin(np.linspace(0.5, 2.9, 16)) + 0.2):
        canvas.box(_shaded(color, float(factor)), column / 16, 0, (column + 1) / 16, 1)
    return canvas.texture()


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


@lru_cache(maxsize=4)
def _signal_texture(lit: int) -> Texture:
    """A traffic light's head; `lit` 0 to 2 is red, amber, green."""
    canvas = Canvas(24, 64, (24, 26, 24), opaque=True)
    lamps = ((255, 50, 40), (255, 190, 40), (60, 255, 130))
    for lamp, color in enumerate(lamps):
        bright = color if lamp == lit else _shaded(color, 0.22)
        canvas.disc(bright, 0.5, (lamp + 0.5) / 3, 0.3, 0.3 * 24 / 64)
    return canvas.texture()


@lru_cache(maxsize=64)
def _car_side_texture(color: Color) -> Texture:
    """Seen from its left: the rear is at the texture's left edge."""
    canvas = Canvas(256, 88, color, opaque=False)
    roof = [(0.03, 0.42), (0.16, 0.04), (0.5, 0.0), (0.6, 0.02), (0.76, 0.38)]
    canvas.polygon(color, *roof, (0.98, 0.46), (1.0, 0.82), (0.0, 0.82), (0.0, 0.5))
    glass = (38, 44, 52)
    canvas.polygon(glass, (0.11, 0.36), (0.19, 0.1), (0.4, 0.07), (0.4, 0.37))
    canvas.polygon(glass, (0.43, 0.37), (0.43, 0.07), (0.58, 0.08), (0.7, 0.38))
    canvas.box(_shaded(color, 0.6), 0.0, 0.74, 1.0, 0.82)
    canvas.box(_shaded(color, 0.7), 0.41, 0.4, 0.415, 0.74)
    canvas.box(_shaded(color, 1.2), 0.02, 0.44, 0.98, 0.47)
    for x in (0.19, 0.81):
        canvas.disc((22, 22, 24), x, 0.78, 0.08, 0.22)
        canvas.disc((120, 122, 125), x, 0.78, 0.045, 0.125)
    return canvas.texture()


@lru_cache(maxsize=64)
def _car_end_texture(color: Color, is_rear: bool) -> Texture:
    """The lower face of a car's front or rear."""
    canvas = Canvas(128, 64, color, opaque=True)
    canvas.box(_shaded(color, 0.55), 0, 0.72, 1, 1)
    canvas.box((20, 20, 22), 0.03, 0.88, 0.18, 1)
    canvas.box((20, 20, 22), 0.82, 0.88, 0.97, 1)
    lamp = (200, 25, 25) if is_rear else (240, 240, 225)
    canvas.box(lamp, 0.03, 0.14, 0.2, 0.42)
    canvas.box(lamp, 0.8, 0.14, 0.97, 0.42)
    if not is_rear:
        canvas.box((25, 25, 28), 0.27, 0.2, 0.73, 0.5)
    canvas.box((225, 225, 205), 0.36, 0.56, 0.64, 0.72)
    return canvas.texture()


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
            canvas.box(_shaded(color, 1.4), 0, 0.54, 1, 0.6)
        else:
            canvas.box(_shaded(color, 0.55), 0.76, 0.12, 1, 0.88)
            canvas.box(glass, 0.84, 0.2, 0.97, 0.46)
        for x in (0.14, 0.28, 0.88) if kind == "truck" else (0.18, 0.8):
            canvas.disc((20, 20, 22), x, 0.87, 0.05, 0.125)
        return canvas.texture()
    canvas.box((24, 24, 26), 0, 0.9, 1, 1)
    if side == "front" or kind == "bus":
        canvas.box(glass, 0.07, 0.12 if kind == "bus" else 0.3, 0.93, 0.55)
    else:
        canvas.box(_shaded(color, 0.8), 0.49, 0.03, 0.51, 0.8)
    lamp = (205, 25, 25) if side == "rear" else (240, 240, 225)
    canvas.box(lamp, 0.04, 0.74, 0.18, 0.84)
    canvas.box(lamp, 0.82, 0.74, 0.96, 0.84)
    return canvas.texture()


_SKINS: Final = ((236, 196, 168), (200, 152, 118), (140, 98, 70), (92, 62, 46))


@lru_cache(maxsize=128)
def _person_texture(style: int, color: Color) -> Texture:
    rng = np.random.default_rng(style)
    skin = _SKINS[int(rng.integers(len(_SKINS)))]
    trousers = _shaded((60, 65, 90), float(rng.uniform(0.4, 1.6)))
    stride = float(rng.uniform(0.02, 0.2))
    canvas = Canvas(64, 160, color, opaque=False)
    canvas.polygon(trousers, (0.32, 0.5), (0.55, 0.5), (0.45 - stride, 0.97), (0.3 - stride, 0.97))
    canvas.polygon(trousers, (0.45, 0.5), (0.7, 0.5), (0.72 + stride, 0.97), (0.57 + stride, 0.97))
    canvas.box((30, 28, 28), 0.27 - stride, 0.96, 0.48 - stride, 1.0)
    canvas.box((30, 28, 28), 0.56 + stride, 0.96, 0.77 + stride, 1.0)
    canvas.polygon(color, (0.28, 0.18), (0.72, 0.18), (0.74, 0.55), (0.28, 0.55))
    canvas.polygon(_shaded(color, 0.8), (0.3, 0.19), (0.2, 0.22), (0.12, 0.5), (0.24, 0.51))
    canvas.polygon(_shaded(color, 0.8), (0.7, 0.19), (0.8, 0.22), (0.88, 0.5), (0.76, 0.51))
    canvas.disc(skin, 0.18, 0.52, 0.06, 0.025)
    canvas.disc(skin, 0.82, 0.52, 0.06, 0.025)
    canvas.box(skin, 0.44, 0.13, 0.56, 0.19)
    canvas.disc(skin, 0.5, 0.085, 0.14, 0.075)
    canvas.disc(_shaded((90, 70, 50), float(rng.uniform(0.2, 1.2))), 0.5, 0.055, 0.15, 0.055)
    canvas.speckle(rng, 5, 1.5)
    return canvas.texture()


@lru_cache(maxsize=64)
def _rider_texture(style: int, color: Color) -> Texture:
    """A rider from behind or from the front: the part above the saddle and the legs."""
    rng = np.random.default_rng(style)
    canvas = Canvas(64, 128, color, opaque=False)
    canvas.polygon((50, 52, 66), (0.3, 0.5), (0.48, 0.5), (0.44, 0.9), (0.24, 0.9))
    canvas.polygon((50, 52, 66), (0.52, 0.5), (0.7, 0.5), (0.76, 0.8), (0.56, 0.8))
    canvas.polygon(color, (0.28, 0.2), (0.72, 0.2), (0.68, 0.58), (0.32, 0.58))
    canvas.polygon(_shaded(color, 0.85), (0.3, 0.2), (0.1, 0.48), (0.2, 0.5), (0.38, 0.3))
    canvas.polygon(_shaded(color, 0.85), (0.7, 0.2), (0.9, 0.48), (0.8, 0.5), (0.62, 0.3))
    canvas.disc(_SKINS[int(rng.integers(len(_SKINS)))], 0.5, 0.12, 0.13, 0.085)
    canvas.disc(_shaded(color, 0.5), 0.5, 0.08, 0.16, 0.075)
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


@lru_cache(maxsize=16)
def _fence_texture(color: Color) -> Texture:
    """One metre of railings."""
    canvas = Canvas(64, 64, color, opaque=False)
    for bar in range(4):
        canvas.box(color, bar / 4 + 0.06, 0.03, bar / 4 + 0.16, 1)
    canvas.box(color, 0, 0.06, 1, 0.14)
    canvas.box(_shaded(color, 0.8), 0, 0.78, 1, 0.86)
    return canvas.texture()


@lru_cache(maxsize=16)
def _brick_texture(style: int, color: Color) -> Texture:
    rng = np.random.default_rng(style)
    canvas = Canvas(96, 96, _shaded(color, 0.75), opaque=True)
    for row in range(12):
        for column in range(-1, 4):
            left = (column + 0.5 * (row % 2)) / 4
            brick = _shaded(color, float(rng.uniform(0.85, 1.15)))
            canvas.box(brick, left + 0.012, row / 12 + 0.012, left + 0.24, (row + 1) / 12)
    return canvas.texture()


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


@lru_cache(maxsize=32)
def _backdrop_texture(style: int) -> Texture:
    """The far end of the world: a line of trees or of roofs against the sky."""
    rng = np.random.default_rng(style)
    canvas = Canvas(1024, 64, (88, 100, 78), opaque=False)
    if style % 2:
        top = 0.62 + 0.12 * _noise(rng, (1, 1024), 40.0)[0] + 0.04 * _noise(rng, (1, 1024), 4.0)[0]
    else:
        canvas.rgba[..., :3] = (116, 112, 110)
        top = np.repeat(rng.uniform(0.25, 0.85, 64), 16)
    rows = (np.arange(64) + 0.5)[:, None] / 64
    canvas.rgba[..., 3] = np.where(rows > top, 255, 0)
    canvas.speckle(rng, 8, 1.5)
    return canvas.texture()


@lru_cache(maxsize=16)
def _cloud_picture(seed: int) -> U8Array:
    """Returns uint8 (512, 512): a seamless field of clouds, 128 is the edge of a cloud."""
    rng = np.random.default_rng(seed)
    field = sum(_noise(rng, (512, 512), sigma) * sigma for sigma in (2.0, 6.0, 18.0, 40.0))
    return np.clip(128 + np.asarray(field) * 1.6, 0, 255).astype(np.uint8)


def _upright(
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
        class_id=_ID[name],
        texture=texture,
    )


def _lengthwise(
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
        class_id=_ID[name],
        texture=texture,
        repeat=repeat,
    )


def _slope(
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
        class_id=_ID[name],
        texture=texture,
    )


def _shadow(thing: Thing, *, is_round: bool, grow: float) -> Surface:
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


def _build_building(thing: Thing) -> Iterator[Surface]:
    side = -math.copysign(1.0, thing.x_m)
    front_m = side * thing.width_m / 2
    facade = _facade_texture(thing.style, thing.color, thing.length_m, thing.height_m)
    yield _lengthwise(thing, "building", facade, x_m=front_m)
    roof_m = thing.height_m * 0.32 if thing.style % 2 else 0.0
    top_m = thing.height_m + roof_m
    gable = _gable_texture(thing.style, thing.color, thing.height_m / top_m)
    yield _upright(thing, "building", gable, top_m=top_m)
    if roof_m:
        tiles = _roof_texture(thing.style, (132, 74, 58) if thing.style % 4 == 1 else (82, 82, 88))
        yield Surface(
            corner=(thing.x_m, -(thing.base_m + top_m), 0.0),
            along=(0.0, 0.0, thing.length_m),
            down=(front_m, roof_m, 0.0),
            class_id=_ID["building"],
            texture=tiles,
            repeat=(thing.length_m / 6, 1.0),
        )


def _build_tree(thing: Thing) -> Iterator[Surface]:
    trunk = _column_texture((96, 78, 62))
    crown_m = thing.height_m * 0.3
    yield _upright(
        thing, "vegetation", trunk, width_m=0.045 * thing.height_m, top_m=0.6 * thing.height_m
    )
    for layer in range(3):
        leaf = _leaf_texture((thing.style + layer) % _NUM_CROWNS, thing.color)
        yield _upright(
            thing,
            "vegetation",
            leaf,
            x_m=(layer - 1) * 0.12 * thing.width_m,
            z_m=(1 - layer) * 0.18 * thing.width_m,
            width_m=thing.width_m * (0.85 if layer != 1 else 1.05),
            bottom_m=crown_m + (0.06 * thing.height_m if layer != 1 else 0.0),
            top_m=thing.height_m * (0.93 if layer != 1 else 1.0),
        )
    yield _shadow(thing, is_round=True, grow=0.9)


def _build_hedge(thing: Thing) -> Iterator[Surface]:
    leaves = _plain_texture(thing.style % 16, thing.color, 16)
    side = -math.copysign(1.0, thing.x_m)
    repeat = (thing.length_m / 1.5, 1.0)
    yield _lengthwise(thing, "vegetation", leaves, x_m=side * thing.width_m / 2, repeat=repeat)
    yield _upright(thing, "vegetation", leaves)
    yield _slope(
        thing,
        "vegetation",
        leaves,
        far=(thing.height_m, thing.length_m),
        near=(thing.height_m, 0.0),
    )


def _build_fence(thing: Thing) -> Iterator[Surface]:
    railings = _fence_texture(thing.color)
    yield _lengthwise(thing, "fence", railings, x_m=0.0, repeat=(thing.length_m, 1.0))


def _build_wall(thing: Thing) -> Iterator[Surface]:
    bricks = _brick_texture(thing.style % 8, thing.color)
    side = -math.copysign(1.0, thing.x_m)
    repeat = (thing.length_m, thing.height_m)
    yield _lengthwise(thing, "wall", bricks, x_m=side * thing.width_m / 2, repeat=repeat)
    yield _upright(thing, "wall", bricks)


def _build_lamp(thing: Thing) -> Iterator[Surface]:
    steel = _column_texture(thing.color)
    arm_m = 0.22 * thing.height_m
    side = -math.copysign(1.0, thing.x_m)
    yield _upright(thing, "pole", steel)
    yield _upright(
        thing,
        "pole",
        steel,
        x_m=side * arm_m / 2,
        width_m=arm_m,
        bottom_m=thing.height_m - 0.1,
    )


def _build_sign(thing: Thing) -> Iterator[Surface]:
    yield _upright(thing, "pole", _column_texture((150, 152, 155)), width_m=0.07)
    yield _upright(
        thing,
        "traffic sign",
        _sign_texture(thing.style),
        z_m=-0.06,
        bottom_m=thing.height_m - thing.width_m,
    )


def _build_signal(thing: Thing) -> Iterator[Surface]:
    steel = _column_texture((70, 74, 72))
    yield _upright(thing, "pole", steel, width_m=0.12)
    head = _signal_texture(thing.style % 3)
    yield _upright(
        thing, "traffic light", head, z_m=-0.1, width_m=0.34, bottom_m=thing.height_m - 0.95
    )


def _build_car(thing: Thing) -> Iterator[Surface]:
    """Body, bonnet, windows and roof; a car that comes towards the camera is turned round."""
    is_turned = thing.style % 2 == 1
    paint = _plain_texture(0, _shaded(thing.color, 1.1), 1.0)
    glass = _plain_texture(1, (52, 60, 70), 3.0, 8.0)
    length, belt, roof = thing.length_m, 0.62 * thing.height_m, 0.97 * thing.height_m
    bottom = 0.14 * thing.height_m

    def at(share: float) -> float:
        return (1 - share if is_turned else share) * length

    side = _car_side_texture(thing.color)
    for x_m in (-thing.width_m / 2, thing.width_m / 2):
        yield _lengthwise(thing, "car", side, x_m=x_m, is_turned=is_turned)
    near_end = _car_end_texture(thing.color, not is_turned)
    yield _upright(thing, "car", near_end, bottom_m=bottom, top_m=belt)
    heights = ((0.0, belt), (0.17, roof), (0.58, roof), (0.76, belt), (1.0, belt * 0.88))
    covers = (glass, paint, glass, paint)
    for cover, first, second in zip(covers, heights[:-1], heights[1:], strict=True):
        edges = sorted(((at(share), height) for share, height in (first, second)))
        (near_z, near_h), (far_z, far_h) = edges
        yield _slope(thing, "car", cover, far=(far_h, far_z), near=(near_h, near_z))
    yield _shadow(thing, is_round=False, grow=1.3)


def _build_van(thing: Thing) -> Iterator[Surface]:
    """A truck or a bus: a box."""
    is_turned = thing.style % 2 == 1
    side = _van_texture(thing.color, thing.kind, "side")
    for x_m in (-thing.width_m / 2, thing.width_m / 2):
        yield _lengthwise(thing, thing.kind, side, x_m=x_m, is_turned=is_turned)
    end = _van_texture(thing.color, thing.kind, "front" if is_turned else "rear")
    yield _upright(thing, thing.kind, end, bottom_m=0.3)
    yield _shadow(thing, is_round=False, grow=1.25)


def _build_person(thing: Thing) -> Iterator[Surface]:
    yield _upright(thing, "person", _person_texture(thing.style, thing.color))
    yield _shadow(thing, is_round=True, grow=1.5)


def _build_rider(thing: Thing) -> Iterator[Surface]:
    """A rider with a bicycle, or with a motorcycle where `style` is even."""
    is_motor = thing.style % 2 == 0
    rider = _rider_texture(thing.style, thing.color)
    cycle = _cycle_texture(is_motor)
    yield _upright(thing, "rider", rider, bottom_m=0.25)
    name = "motorcycle" if is_motor else "bicycle"
    yield _upright(thing, name, cycle, z_m=-0.3, top_m=0.62 * thing.height_m)
    yield _shadow(thing, is_round=True, grow=1.6)


THING_KINDS: Final[dict[str, Callable[[Thing], Iterator[Surface]]]] = {
    "building": _build_building,
    "tree": _build_tree,
    "hedge": _build_hedge,
    "fence": _build_fence,
    "wall": _build_wall,
    "lamp": _build_lamp,
    "sign": _build_sign,
    "signal": _build_signal,
    "car": _build_car,
    "truck": _build_van,
    "bus": _build_van,
    "person": _build_person,
    "rider": _build_rider,
}
"""What a `Thing.kind` may be, and what draws it."""


@lru_cache(maxsize=4096)
def _surfaces_of(thing: Thing) -> tuple[Surface, ...]:
    """Returns the thing's surfaces, its front end at z = 0."""
    return tuple(THING_KINDS[thing.kind](thing))


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
        class_id=_ID[name],
        texture=texture,
        repeat=(across, (far_m - near_m) / (period_m or GROUND_PERIOD_M)),
    )


def _ground(street: Street, camera_z_m: float) -> Iterator[Surface]:
    """Yields road, kerbs, pavements and the land beyond, in pieces that grow with distance."""
    road = _road_texture(street)
    pavement = _pavement_texture(street.style)
    grass = _plain_texture(street.style % 8, (92, 112, 58), 9)
    stone = _plain_texture(street.style % 8, (168, 166, 160), 5)
    start = math.floor(camera_z_m / GROUND_PERIOD_M) * GROUND_PERIOD_M
    kerb, edge = street.half_m, street.half_m + street.pavement_m
    steps = (0, 1, 2, 4, 8, 16, 32, 250)
    for first, last in itertools.pairwise(steps):
        near, far = start + first * GROUND_PERIOD_M, start + last * GROUND_PERIOD_M
        yield _level(-kerb, kerb, 0.0, near, far, name="road", texture=road)
        for side in (-1, 1):
            left, right = sorted((side * kerb, side * edge))
            yield _level(left, right, KERB_M, near, far, name="sidewalk", texture=pavement)
            left, right = sorted((side * edge, side * 800.0))
            yield _level(
                left, right, KERB_M, near, far, name="terrain", texture=grass, period_m=4.0
            )
            yield Surface(
                corner=(side * kerb, -KERB_M, near),
                along=(0.0, 0.0, far - near),
                down=(0.0, KERB_M, 0.0),
                class_id=_ID["sidewalk"],
                texture=stone,
                repeat=((far - near) / 2, 1.0),
            )


def _backdrop(drive: Drive, camera_z_m: float) -> Surface:
    """A far line of trees or roofs that keeps its distance from the camera."""
    name = "vegetation" if drive.street.style % 2 else "building"
    return Surface(
        corner=(-900.0, -26.0, camera_z_m + BACKDROP_M),
        along=(1800.0, 0.0, 0.0),
        down=(0.0, 26.0, 0.0),
        class_id=_ID[name],
        texture=_backdrop_texture(drive.street.style),
    )


def _surfaces_at(drive: Drive, time_s: float) -> tuple[list[Surface], F64Array]:
    """Returns all surfaces near the camera, and what to add to each one's z, float64 (N,)."""
    camera_z_m = drive.speed_mps * time_s
    surfaces = [*_ground(drive.street, camera_z_m), _backdrop(drive, camera_z_m)]
    offsets = [0.0] * len(surfaces)
    for thing in drive.things:
        ahead_m = thing.z_m + thing.speed_mps * time_s - camera_z_m
        z_m = camera_z_m + (ahead_m + _BEHIND_M) % STREET_LENGTH_M - _BEHIND_M
        pieces = _surfaces_of(thing)
        surfaces += pieces
        offsets += [z_m] * len(pieces)
    return surfaces, np.array(offsets)


class _View(NamedTuple):
    """The camera at one moment: rays = pixels @ inverse intrinsics, world = R^T camera."""

    rotation: F64Array
    position: F64Array
    intrinsics: F64Array
    width_px: int
    height_px: int


def _rotation(pitch_rad: float, yaw_rad: float, roll_rad: float) -> F64Array:
    """Returns float64 (3, 3), world to camera; pitch is downwards, yaw is to the right."""
    sin_p, cos_p = math.sin(pitch_rad), math.cos(pitch_rad)
    sin_y, cos_y = math.sin(yaw_rad), math.cos(yaw_rad)
    sin_r, cos_r = math.sin(roll_rad), math.cos(roll_rad)
    pitch = np.array([[1, 0, 0], [0, cos_p, -sin_p], [0, sin_p, cos_p]])
    yaw = np.array([[cos_y, 0, -sin_y], [0, 1, 0], [sin_y, 0, cos_y]])
    roll = np.array([[cos_r, sin_r, 0], [-sin_r, cos_r, 0], [0, 0, 1]])
    return np.asarray(roll @ pitch @ yaw, dtype=np.float64)


def _view(drive: Drive, time_s: float, width_px: int, height_px: int) -> _View:
    camera, sway = drive.camera, drive.camera.sway
    phase = drive.seed % 7
    focal_px = camera.focal_widths * width_px
    return _View(
        rotation=_rotation(
            camera.pitch_rad + sway * 0.004 * math.sin(8.0 * time_s + phase),
            sway * 0.02 * math.sin(0.6 * time_s + phase),
            sway * 0.006 * math.sin(2.3 * time_s + phase),
        ),
        position=np.array(
            [
                camera.x_m + sway * 0.2 * math.sin(0.45 * time_s + phase),
                -camera.height_m - sway * 0.015 * math.sin(7.0 * time_s + phase),
                drive.speed_mps * time_s,
            ]
        ),
        intrinsics=np.array(
            [
                [focal_px, 0, (width_px - 1) / 2],
                [0, focal_px, (height_px - 1) / 2],
                [0, 0, 1],
            ]
        ),
        width_px=width_px,
        height_px=height_px,
    )


class _Projected(NamedTuple):
    """Surfaces in a view, nearest first.

    `planes` float64 (N, 3, 3): times (u, v, 1) gives (s, t, 1) / z, where (s, t) is the place on
    the surface, 0 to 1, and z the depth. `boxes` int64 (N, 4): left, top, right, bottom pixels,
    half open. `areas_px` (N,): of the whole surface's box, for the texture's sharpness.
    `shades` (N,): factor of its light.
    """

    order: npt.NDArray[np.int64]
    planes: F64Array
    boxes: npt.NDArray[np.int64]
    areas_px: F64Array
    shades: F64Array


def _pixel_boxes(corners: F64Array, view: _View) -> tuple[npt.NDArray[np.int64], F64Array]:
    """Returns the pixel boxes (N, 4) and their areas before the picture's edge cuts them.

    `corners` is float64 (N, 4, 3) in camera space, in ring order. What lies nearer than `NEAR_M`
    is cut off first, so that every point left can be projected.
    """
    following = np.roll(corners, -1, axis=1)
    depth, next_depth = corners[..., 2], following[..., 2]
    crosses = (depth < NEAR_M) != (next_depth < NEAR_M)
    step = np.where(crosses, next_depth - depth, 1.0)
    share = np.where(crosses, (NEAR_M - depth) / step, 0.0)[..., None]
    points = np.concatenate([corners, corners + share * (following - corners)], axis=1)
    usable = np.concatenate([depth >= NEAR_M, crosses], axis=1)[..., None]
    projected = points @ view.intrinsics.T
    pixels = projected[..., :2] / np.where(usable, projected[..., 2:], 1.0)
    low = np.where(usable, pixels, np.inf).min(axis=1)
    high = np.where(usable, pixels, -np.inf).max(axis=1)
    areas = np.prod(np.maximum(high - low, 0.0), axis=1, where=np.isfinite(low))
    limit = np.array([view.width_px, view.height_px])
    first = np.clip(np.nan_to_num(np.ceil(low), posinf=1e9), 0, limit).astype(np.int64)
    last = np.clip(np.nan_to_num(np.floor(high) + 1, neginf=-1e9), 0, limit).astype(np.int64)
    return np.concatenate([first, last], axis=1), areas


def _shades(normals: F64Array, to_camera: F64Array, flat: BoolArray, light: Light) -> F64Array:
    """Returns the light on each surface (N,): Lambert on the side that the camera sees."""
    facing = np.sign(np.einsum("ni,ni->n", normals, to_camera))[:, None]
    unit = facing * normals / np.linalg.norm(normals, axis=1, keepdims=True)
    lit = np.maximum(unit @ np.array(light.sun), 0.0)
    lit = np.where(flat, 0.6, lit)
    return np.asarray(light.ambient + (1.0 - light.ambient) * 1.15 * lit, dtype=np.float64)


def _project(surfaces: list[Surface], offsets: F64Array, view: _View, light: Light) -> _Projected:
    corner = np.array([surface.corner for surface in surfaces])
    corner[:, 2] += offsets
    along = np.array([surface.along for surface in surfaces])
    down = np.array([surface.down for surface in surfaces])
    flat = np.array([surface.texture.cutout for surface in surfaces])
    frames = np.stack([along, down, corner - view.position], axis=2)
    frames = view.rotation @ frames
    ring = [(0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)]
    boxes, areas = _pixel_boxes(np.swapaxes(frames @ np.array(ring).T, 1, 2), view)
    seen = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    seen &= np.abs(np.linalg.det(frames)) > 1e-9
    nearest = frames[:, 2, 2] + np.minimum(frames[:, 2, 0], 0) + np.minimum(frames[:, 2, 1], 0)
    kept = np.flatnonzero(seen)
    order = kept[np.argsort(nearest[kept], kind="stable")]
    return _Projected(
        order=order,
        planes=np.linalg.inv(frames[order]) @ np.linalg.inv(view.intrinsics),
        boxes=boxes[order],
        areas_px=areas[order],
        shades=_shades(
            np.cross(along, down)[order], (view.position - corner)[order], flat[order], light
        ),
    )


class _Buffers(NamedTuple):
    """What is being drawn: RGB, train ids and inverse depth (0: nothing yet)."""

    rgb: U8Array
    class_ids: U8Array
    inverse_m: F32Array


def _sample(surface: Surface, plane: F64Array, box: tuple[int, ...], area_px: float) -> U8Array:
    """Returns the texture as seen through a box of pixels, uint8 (h, w, 4)."""
    levels = surface.texture.levels
    repeat_s, repeat_t = surface.repeat
    num_texels = levels[0].shape[0] * levels[0].shape[1] * repeat_s * repeat_t
    level = round(0.5 * math.log2(max(num_texels / max(area_px, 1.0), 1.0)))
    picture = levels[min(level, len(levels) - 1)]
    height_px, width_px = picture.shape[:2]
    left, top, right, bottom = box
    to_texels = np.array(
        [[repeat_s * width_px, 0, -0.5], [0, repeat_t * height_px, -0.5], [0, 0, 1]]
    )
    from_box = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]])
    border = cv2.BORDER_REPLICATE if surface.repeat == (1.0, 1.0) else cv2.BORDER_WRAP
    return np.asarray(
        cv2.warpPerspective(
            picture,
            to_texels @ plane @ from_box,
            (right - left, bottom - top),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=border,
        ),
        dtype=np.uint8,
    )


def _coverage(plane: F64Array, box: tuple[int, ...]) -> tuple[BoolArray, F32Array]:
    """Returns which pixel centres of a box the parallelogram covers, and its inverse depth."""
    left, top, right, bottom = box
    columns = plane[:, :1] * np.arange(left, right)
    rows = plane[:, 1:2] * np.arange(top, bottom) + plane[:, 2:]
    s, t, inverse = (
        (column + row[:, None]).astype(np.float32)
        for column, row in zip(columns, rows, strict=True)
    )
    inside = (s >= 0) & (t >= 0) & (s <= inverse) & (t <= inverse)
    inside &= inverse < 1 / NEAR_M
    return inside, inverse


def _draw_surfaces(surfaces: list[Surface], projected: _Projected, buffers: _Buffers) -> None:
    """Draws all surfaces but shadows, nearest first, so that most hidden ones cost nothing."""
    for index, plane, corners, area_px, shade in zip(*projected, strict=True):
        surface = surfaces[index]
        if surface.is_shadow:
            continue
        box = left, top, right, bottom = tuple(int(value) for value in corners)
        window = (slice(top, bottom), slice(left, right))
        visible, inverse = _coverage(plane, box)
        visible &= inverse > buffers.inverse_m[window]
        if not visible.any():
            continue
        picture = _sample(surface, plane, box, area_px)
        if surface.texture.cutout:
            visible &= picture[..., 3] > 127
        shaded = cv2.convertScaleAbs(picture[..., :3], alpha=float(shade))
        np.copyto(buffers.rgb[window], shaded, where=visible[..., None])
        np.copyto(buffers.inverse_m[window], inverse, where=visible)
        np.copyto(buffers.class_ids[window], np.uint8(surface.class_id), where=visible)


def _draw_shadows(
    surfaces: list[Surface], projected: _Projected, light: Light, buffers: _Buffers
) -> None:
    """Darkens the ground where a shadow's plane is what the pixel shows."""
    for index, plane, corners, area_px, _ in zip(*projected, strict=True):
        surface = surfaces[index]
        if not surface.is_shadow:
            continue
        box = left, top, right, bottom = tuple(int(value) for value in corners)
        window = (slice(top, bottom), slice(left, right))
        covered, inverse = _coverage(plane, box)
        covered &= np.abs(inverse - buffers.inverse_m[window]) < 1e-4 * inverse
        if covered.any():
            darkness = _sample(surface, plane, box, area_px)[..., 3] * np.float32(1 / 255)
            factor = 1 - (0.75 - 0.35 * light.ambient) * darkness * covered
            ground = buffers.rgb[window]
            ground[...] = ground * factor[..., None]


def _rgb(values: tuple[float, float, float]) -> F32Array:
    return np.array(values, np.float32)


def _sky(drive: Drive, view: _View) -> F32Array:
    """Returns the sky as float32 (H, W, 3), RGB, drawn at a quarter of the size: it is smooth."""
    light = drive.light
    size = (math.ceil(view.width_px / 4), math.ceil(view.height_px / 4))
    scale_x, scale_y = view.width_px / size[0], view.height_px / size[1]
    to_full = np.array(
        [[scale_x, 0, scale_x / 2 - 0.5], [0, scale_y, scale_y / 2 - 0.5], [0, 0, 1]]
    )
    to_world = view.rotation.T @ np.linalg.inv(view.intrinsics) @ to_full
    columns = to_world[1, 0] * np.arange(size[0])
    rows = to_world[1, 1] * np.arange(size[1]) + to_world[1, 2]
    upward = np.clip(-(columns + rows[:, None]), 0.0, 1.0).astype(np.float32)
    height = np.sqrt(upward * 1.6).clip(0, 1)[..., None]
    horizon, zenith = _rgb(light.horizon), _rgb(light.zenith)
    sky = horizon + height * (zenith - horizon)
    to_clouds = np.array([[0.14, 0, 0], [0, 0, 0.14], [0, -1 / 300, 0]]) @ to_world
    cloud = cv2.warpPerspective(
        _cloud_picture(drive.seed),
        to_clouds,
        size,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_WRAP,
    )
    density = (cloud.astype(np.float32) - 255 * (1 - light.clouds)) * (1 / 90)
    cover = np.clip(density, 0, 1) * np.clip(upward * 6, 0, 1)
    white = horizon * 0.35 + 160
    sky = sky + 0.8 * cover[..., None] * (white - sky)
    return np.asarray(
        cv2.resize(sky, (view.width_px, view.height_px), interpolation=cv2.INTER_LINEAR),
        dtype=np.float32,
    )


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
    exposed = blurred * (corner_shade[..., None] * _rgb(drive.light.gain))
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
    view = _view(drive, time_s, width_px, height_px)
    surfaces, offsets = _surfaces_at(drive, time_s)
    projected = _project(surfaces, offsets, view, drive.light)
    buffers = _Buffers(
        rgb=np.zeros((height_px, width_px, 3), np.uint8),
        class_ids=np.full((height_px, width_px), _ID["sky"], np.uint8),
        inverse_m=np.zeros((height_px, width_px), np.float32),
    )
    _draw_surfaces(surfaces, projected, buffers)
    _draw_shadows(surfaces, projected, drive.light, buffers)
    hit = buffers.inverse_m > 0
    depth_m = np.divide(1, buffers.inverse_m, out=np.zeros_like(buffers.inverse_m), where=hit)
    clear = np.where(hit, np.exp(depth_m * (-1 / drive.light.haze_m)), 0)[..., None]
    horizon = _rgb(drive.light.horizon)
    air = np.where(hit[..., None], horizon, _sky(drive, view))
    frame: F32Array = air + clear * (buffers.rgb.astype(np.float32) - air)
    if drive.camera.bonnet > 0:
        _draw_bonnet(drive.camera, frame, buffers)
        depth_m[buffers.inverse_m == 0] = 0
    return Scene(_expose(frame, drive, time_s), buffers.class_ids, depth_m)


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

_PLASTER: Final = (
    (186, 170, 148),
    (164, 92, 74),
    (201, 192, 176),
    (150, 146, 142),
    (178, 148, 112),
    (128, 110, 98),
    (205, 180, 140),
    (122, 132, 142),
    (176, 120, 96),
)
_PAINTS: Final = (
    (30, 32, 36),
    (205, 208, 210),
    (142, 146, 150),
    (128, 24, 28),
    (30, 52, 104),
    (82, 88, 94),
    (230, 230, 228),
    (48, 74, 62),
    (176, 150, 96),
    (62, 92, 132),
)
_CLOTHES: Final = (
    (40, 44, 60),
    (150, 40, 44),
    (60, 96, 150),
    (205, 200, 190),
    (74, 92, 60),
    (210, 160, 50),
    (96, 60, 96),
    (30, 30, 32),
)
_LEAVES: Final = ((74, 104, 42), (96, 122, 50), (60, 88, 44), (126, 124, 54), (88, 110, 66))


def _pick(rng: np.random.Generator, colors: tuple[Color, ...]) -> Color:
    return _shaded(colors[int(rng.integers(len(colors)))], float(rng.uniform(0.85, 1.15)))


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
    edge_m = street.half_m + street.pavement_m
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
    pole_color = _shaded((110, 114, 116), float(rng.uniform(0.4, 1.2)))
    lamp_m = float(rng.uniform(5.5, 9.0))
    for z_m in np.arange(8.0 + 15 * (side > 0), STREET_LENGTH_M, 30.0):
        yield Thing("lamp", kerb_m, float(z_m), 0.16, lamp_m, color=pole_color, base_m=KERB_M)
    spacing_m = float(rng.choice([9.0, 14.0, 22.0, 60.0]))
    for z_m in np.arange(2.0, STREET_LENGTH_M, spacing_m):
        if rng.random() < 0.75:
            yield _tree(rng, side * (street.half_m + 1.0), float(z_m + rng.uniform(0, 4)))
    for _ in range(5):
        z_m, size_m = rng.uniform(0, STREET_LENGTH_M), rng.uniform(0.6, 0.9)
        height_m = float(rng.uniform(2.5, 3.3))
        yield Thing(
            "sign", kerb_m, float(z_m), float(size_m), height_m, base_m=KERB_M, style=_style(rng)
        )
    for z_m in (52.0, 168.0):
        yield Thing("signal", kerb_m, z_m, 0.3, 3.6, base_m=KERB_M, style=street.style)


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
    """Yields walkers on the pavement and riders along the parked cars."""
    for _ in range(int(rng.integers(5, 16))):
        x_m = side * (street.half_m + rng.uniform(0.5, max(0.8, street.pavement_m - 0.4)))
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
    for _ in range(int(rng.integers(1, 4))):
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
        lane_m=float(rng.uniform(3.0, 3.6)),
        parking_m=float(rng.uniform(2.2, 2.6)),
        pavement_m=float(rng.uniform(2.0, 4.5)),
        style=_style(rng),
    )


def _make_camera(rng: np.random.Generator, street: Street) -> Camera:
    return Camera(
        x_m=street.lane_m * (float(rng.integers(street.num_lanes)) + 0.5),
        height_m=float(rng.uniform(1.15, 1.9)),
        pitch_rad=float(rng.uniform(-0.02, 0.09)),
        focal_widths=float(rng.uniform(0.6, 1.15)),
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
