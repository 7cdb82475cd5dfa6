"""Painting textures: a canvas, seamless noise, and the two materials that many things share."""

import math
from functools import lru_cache
from typing import Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from segformer3d.scenes.world import Color, F32Array, U8Array

_TURN: Final = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE: Final = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)


class Texture(NamedTuple):
    """RGBA pictures uint8 (h, w, 4), each half the size of the one before; alpha cuts out."""

    levels: tuple[U8Array, ...]
    cutout: bool


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
        noise = seamless_noise(rng, self.rgba.shape[:2], sigma_px)[..., None] * strength
        self.rgba[..., :3] = np.clip(self.rgba[..., :3] + noise, 0, 255)

    def texture(self) -> Texture:
        """Returns the picture with its smaller versions."""
        levels = [self.rgba]
        while min(levels[-1].shape[:2]) > 3:
            height_px, width_px = levels[-1].shape[:2]
            size = (width_px // 2, height_px // 2)
            levels.append(cv2.resize(levels[-1], size, interpolation=cv2.INTER_AREA))
        return Texture(tuple(levels), cutout=bool((self.rgba[..., 3] < 255).any()))


def seamless_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma_px: float) -> F32Array:
    """Returns noise (h, w) of mean 0 and deviation 1 that repeats without a seam."""
    if sigma_px > 6:
        small = seamless_noise(rng, tuple(math.ceil(side / 4) for side in shape), sigma_px / 4)
        return np.asarray(cv2.resize(small, shape[::-1], interpolation=cv2.INTER_LINEAR))
    margin = math.ceil(3 * sigma_px)
    white = rng.standard_normal(shape, dtype=np.float32)
    padded = np.pad(white, margin, mode="wrap")
    smooth = cv2.GaussianBlur(padded, (0, 0), sigma_px)
    inner = smooth[margin : margin + shape[0], margin : margin + shape[1]]
    return np.asarray((inner - inner.mean()) / (inner.std() + 1e-6), dtype=np.float32)


def shaded(color: Color, factor: float) -> Color:
    """Returns the color times a factor."""
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in color)
    return red, green, blue


@lru_cache(maxsize=64)
def plain_texture(style: int, color: Color, strength: float, sigma_px: float = 1.2) -> Texture:
    """A seamless square of one colour with two grains of noise."""
    rng = np.random.default_rng(style)
    canvas = Canvas(128, 128, color, opaque=True)
    canvas.speckle(rng, strength, sigma_px)
    canvas.speckle(rng, strength, 6 * sigma_px)
    return canvas.texture()


@lru_cache(maxsize=64)
def column_texture(color: Color) -> Texture:
    """A round pole, lit from one side."""
    canvas = Canvas(16, 16, color, opaque=True)
    for column, factor in enumerate(np.sin(np.linspace(0.5, 2.9, 16)) + 0.2):
        canvas.box(shaded(color, float(factor)), column / 16, 0, (column + 1) / 16, 1)
    return canvas.texture()
