"""Sizes and orientations of frames: from an asset's pixels to the model's input.

A frame is oriented first, then resized. The rule of sizes is `segformer3d.geometry`'s, for training
and evaluation go by it as well; here its failures become typed rows.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline.errors import InputError
from segformer3d.geometry import (
    FrameSizeError,
    Geometry,
    GeometryMode,
    UInt8Array,
    resize,
    short_side_of,
)
from segformer3d.geometry import input_size as frame_input_size

__all__ = [
    "MAX_PIXELS",
    "Geometry",
    "GeometryMode",
    "Orientation",
    "UInt8Array",
    "input_size",
    "resize",
    "short_side_of",
]

# Of any asset, whatever its job allows; a stored row that says more is not ours.
MAX_PIXELS = 2**28


def input_size(width: int, height: int, geometry: Geometry) -> tuple[int, int]:
    """Model input size ``(width, height)`` of an asset of that oriented size.

    Raises:
        InputError: ``too_large`` for an aspect ratio above 8 in ``keep_aspect``; ``corrupt`` for
            a side of zero.
    """
    try:
        return frame_input_size(width, height, geometry)
    except FrameSizeError as error:
        has_pixels = min(width, height) > 0
        raise InputError("too_large" if has_pixels else "corrupt", str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """One of the eight ways to put a stored frame upright: transpose first, then flip.

    Attributes:
        transpose: Swap rows and columns.
        flip_x: Then mirror left and right.
        flip_y: Then mirror top and bottom.
    """

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def from_exif(cls, tag: object) -> Self:
        """From the EXIF orientation tag, 1 to 8; anything else counts as upright."""
        flags = _EXIF.get(tag, (False, False, False)) if isinstance(tag, int) else (False,) * 3
        return cls(transpose=flags[0], flip_x=flags[1], flip_y=flags[2])

    @classmethod
    def from_display_matrix(cls, data: bytes) -> Self:
        """From FFmpeg's display matrix: nine native int32; skewed ones go to the nearest turn."""
        a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(transpose=True, flip_x=c < 0, flip_y=b < 0)
        return cls(flip_x=a < 0, flip_y=d < 0)

    @property
    def rotation_deg(self) -> int:
        """Counterclockwise turn in degrees, apart from a mirroring."""
        if self.transpose:
            return 90 if self.flip_y else 270
        return 180 if self.flip_y else 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` of the upright frame."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, frame: UInt8Array) -> UInt8Array:
        """The upright frame, contiguous."""
        if self.transpose:
            frame = frame.transpose(1, 0, 2)
        if self.flip_x:
            frame = frame[:, ::-1]
        if self.flip_y:
            frame = frame[::-1]
        return np.ascontiguousarray(frame)


_EXIF = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
