"""The words that a drive is described with: street, things, camera, light; and a rendered scene.

Space: x right, y down, z forward along the road, metres, the road's surface at y = 0.
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from segformer3d.labels import CLASSES

U8Array = npt.NDArray[np.uint8]
F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Color = tuple[int, int, int]
Point = tuple[float, float, float]

STREET_LENGTH_M: Final = 240.0
"""The street repeats itself after this length, so a drive never ends."""
KERB_M: Final = 0.12
"""Height of the pavement above the road."""

TRAIN_IDS: Final = {entry.name: entry.train_id for entry in CLASSES}
"""Train id of each Cityscapes class by its name."""


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
        verge_m: Width of the grass between kerb and pavement; often there is none.
        style: Seed of the surfaces' textures.
    """

    num_lanes: int
    lane_m: float
    parking_m: float
    pavement_m: float
    style: int
    verge_m: float = 0.0

    @property
    def half_m(self) -> float:
        """Distance from the road's middle to its kerb."""
        return self.num_lanes * self.lane_m + self.parking_m

    @property
    def walk_m(self) -> float:
        """Distance from the road's middle to where the pavement begins."""
        return self.half_m + self.verge_m

    @property
    def edge_m(self) -> float:
        """Distance from the road's middle to where the pavement ends."""
        return self.walk_m + self.pavement_m


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

    @property
    def inner_m(self) -> float:
        """Offset from its middle to the face that looks at the road."""
        return math.copysign(self.width_m / 2, -self.x_m)


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
