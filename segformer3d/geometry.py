"""Sizes of frames: the one rule from a frame's pixels to the model's input.

Jobs, training and evaluation share it. Area interpolation if no side grows, linear otherwise (so
also where one side grows and the other shrinks).
"""

from dataclasses import dataclass
from typing import Literal, cast

import cv2
import numpy as np
import numpy.typing as npt

GeometryMode = Literal["keep_aspect", "stretch"]
UInt8Array = npt.NDArray[np.uint8]

SIDE_MULTIPLE_PX = 32
MAX_ASPECT_RATIO = 8


class FrameSizeError(ValueError):
    """A frame that no input size fits; the message is one line."""


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


def short_side_of(trained_px: int | None) -> int:
    """Return the short side for weights trained at one: the nearest multiple of 32, else 512."""
    side_px = Geometry.short_side_px if trained_px is None else trained_px
    return max(1, round(side_px / SIDE_MULTIPLE_PX)) * SIDE_MULTIPLE_PX


def input_size(width: int, height: int, geometry: Geometry) -> tuple[int, int]:
    """Model input size ``(width, height)`` of a frame of that oriented size.

    Each side is scaled so that the short side becomes ``short_side_px`` and rounded to the nearest
    multiple of 32 (halves up).

    Raises:
        FrameSizeError: An aspect ratio above 8 in ``keep_aspect``, or a side of zero.
    """
    if width <= 0 or height <= 0:
        message = f"a frame of {width}x{height} has no pixels"
        raise FrameSizeError(message)
    if geometry.mode == "stretch":
        return geometry.stretch_size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT_RATIO * short:
        message = f"{width}x{height} is longer than {MAX_ASPECT_RATIO} times its short side"
        raise FrameSizeError(message)
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


def _scaled_side(side: int, short: int, target: int) -> int:
    multiples = (2 * side * target + SIDE_MULTIPLE_PX * short) // (2 * SIDE_MULTIPLE_PX * short)
    return max(1, multiples) * SIDE_MULTIPLE_PX
