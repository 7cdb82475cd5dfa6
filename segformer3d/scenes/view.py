"""Where the camera is at one moment, which way it looks, and its intrinsics."""

import math
from typing import NamedTuple

import numpy as np

from segformer3d.scenes.world import Drive, F64Array


class View(NamedTuple):
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


def view_at(drive: Drive, time_s: float, width_px: int, height_px: int) -> View:
    """Returns the view of a drive's swaying camera after `time_s` seconds."""
    camera, sway = drive.camera, drive.camera.sway
    phase = drive.seed % 7
    focal_px = camera.focal_widths * width_px
    return View(
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
