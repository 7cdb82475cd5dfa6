"""Sizes and orientations of frames: the one rule from an asset's pixels to the model's input.

A frame is oriented first, then resized: area interpolation if no side grows, linear otherwise (so
also where one side grows and the other shrinks).
"""

from dataclasses import dataclass
from typing import Literal, Self, cast

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError

GeometryMode = Literal["keep_aspect", "stretch"]
UInt8Array = npt.NDArray[np.uint8]

SIDE_MULTIPLE_PX = 32
MAX_ASPECT_RATIO = 8


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How an asset's frames become the model's input.

    Attributes:
        mode: ``keep_aspect`` scales the short side to ``short_side_px``; ``stretch`` ignores the
            aspect ratio.
        short_side_px: Short side for ``keep_aspect``, a multiple of 32.
        stretch_size: ``(width, height)`` for ``stretch``, multiples of 32.
    """

    mode: GeometryMode = "keep_aspect"
    short_side_px: int = 512
    stretch_size: tuple[int, int] = (1024, 512)

    def __post_init__(self) -> None:
        """Reject sides that break the H/4 grid.

        Raises:
            ValueError: If a side is not a positive multiple of 32, or the mode is unknown.
        """
        if self.mode not in ("keep_aspect", "stretch"):
            message = f"unknown geometry mode {self.mode!r}"
            raise ValueError(message)
        for side in (self.short_side_px, *self.stretch_size):
            if side <= 0 or side % SIDE_MULTIPLE_PX:
                message = f"sides must be positive multiples of {SIDE_MULTIPLE_PX}, got {side}"
                raise ValueError(message)


def input_size(width: int, height: int, geometry: Geometry) -> tuple[int, int]:
    """Model input size ``(width, height)`` of an asset of that oriented size.

    Each side is scaled so that the short side becomes ``short_side_px`` and rounded to the nearest
    multiple of 32 (halves up).

    Raises:
        InputError: ``too_large`` for an aspect ratio above 8 in ``keep_aspect``; ``corrupt`` for
            a side of zero.
    """
    if width <= 0 or height <= 0:
        message = f"a frame of {width}x{height} has no pixels"
        raise InputError("corrupt", message)
    if geometry.mode == "stretch":
        return geometry.stretch_size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT_RATIO * short:
        message = f"{width}x{height} is longer than {MAX_ASPECT_RATIO} times its short side"
        raise InputError("too_large", message)
    return (
        _scaled_side(width, short, geometry.short_side_px),
        _scaled_side(height, short, geometry.short_side_px),
    )


def resize(frame: UInt8Array, size: tuple[int, int], out: UInt8Array | None = None) -> UInt8Array:
    """Resize ``(H, W, 3)`` to ``size = (width, height)`` by the rule of this module.

    Args:
        frame: The oriented frame.
        size: Width and height of the result.
        out: Contiguous ``(height, width, 3)`` array to fill, if there is one already.
    """
    height, width = frame.shape[:2]
    if (width, height) == size:
        if out is None:
            return frame
        np.copyto(out, frame)
        return out
    shrinks = size[0] <= width and size[1] <= height
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cast("UInt8Array", cv2.resize(frame, size, dst=out, interpolation=method))
    if out is not None and not np.may_share_memory(resized, out):
        np.copyto(out, resized)
        return out
    return resized


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


def _scaled_side(side: int, short: int, target: int) -> int:
    multiples = (2 * side * target + SIDE_MULTIPLE_PX * short) // (2 * SIDE_MULTIPLE_PX * short)
    return max(1, multiples) * SIDE_MULTIPLE_PX
