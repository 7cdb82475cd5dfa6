"""The sky: a gradient from horizon to zenith with a layer of clouds."""

import math
from functools import lru_cache

import cv2
import numpy as np

from segformer3d.scenes.canvas import seamless_noise
from segformer3d.scenes.view import View
from segformer3d.scenes.world import Drive, F32Array, U8Array


@lru_cache(maxsize=16)
def _cloud_picture(seed: int) -> U8Array:
    """Returns uint8 (512, 512): a seamless field of clouds, 128 is the edge of a cloud."""
    rng = np.random.default_rng(seed)
    field = sum(seamless_noise(rng, (512, 512), sigma) * sigma for sigma in (2.0, 6.0, 18.0, 40.0))
    return np.clip(128 + np.asarray(field) * 1.6, 0, 255).astype(np.uint8)


def draw_sky(drive: Drive, view: View) -> F32Array:
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
    horizon, zenith = np.array(light.horizon, np.float32), np.array(light.zenith, np.float32)
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
