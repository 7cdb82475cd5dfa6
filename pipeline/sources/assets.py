"""What the sources share: the limits of reading, and what a probe learns about one asset."""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ErrorKind, InputError
from pipeline.records import Asset
from pipeline.sources.capture import Capture

MIB_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """Bounds that keep one hostile input from hurting the rest.

    Attributes:
        max_pixels: Largest width times height of an image or a video frame.
        max_file_bytes: Largest image file; videos are streamed and have no bound.
        deadline_s: Longest time without progress: one image, or one video frame.
        memory_bytes: Private memory of the decoding child, without the shared pixels.
    """

    max_pixels: int = 100_000_000
    max_file_bytes: int = 256 * MIB_BYTES
    deadline_s: float = 60.0
    memory_bytes: int = 4096 * MIB_BYTES


@dataclass(frozen=True, kw_only=True)
class AssetProbe:
    """What planning needs to know of one asset.

    Attributes:
        asset: The asset.
        width: Width in pixels after orientation; 0 if it could not be opened.
        height: Height, likewise.
        pts: A video's frames in presentation order, in ticks; empty for an image.
        keyframe_pts: Ticks of the keyframes among them, sorted.
        time_base: Seconds per tick.
        needs_start: Whether its frames can only be decoded from its beginning on.
        rotation_deg: Counterclockwise turn that the orientation applies.
        duration_s: Length of a video; 0 for an image.
        capture: When and where, as far as the asset says.
        promised_frames: Number of frames that the container claims, where it does.
        num_missing: Frames that are promised or evident but cannot be demuxed.
        missing_kind: Their kind of error.
        missing_error: The message that goes with it.
        members: Of a tar, the images and videos that it holds, in its order.
        error_kind: Set if the asset cannot be opened at all.
        error: The message that goes with it.
    """

    asset: Asset
    width: int = 0
    height: int = 0
    pts: tuple[int, ...] = ()
    keyframe_pts: tuple[int, ...] = ()
    time_base: Fraction = Fraction(1)
    needs_start: bool = False
    rotation_deg: int = 0
    duration_s: float = 0.0
    capture: Capture = field(default_factory=Capture)
    promised_frames: int | None = None
    num_missing: int = 0
    missing_kind: ErrorKind | None = None
    missing_error: str | None = None
    members: tuple[Asset, ...] = ()
    error_kind: ErrorKind | None = None
    error: str | None = None


def nearest_of_8_bits(largest: int) -> NDArray[np.uint8]:
    """For every sample below 256, the nearest of 8 bits; the largest, and any beyond, is 255."""
    eight = (np.arange(256) * 255 + largest // 2) // largest
    return np.minimum(eight, 255).astype(np.uint8)


def check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    """Refuse frames that are too large to decode.

    Raises:
        InputError: ``too_large``.
    """
    if width * height > limits.max_pixels:
        message = f"{width}x{height} is more than {limits.max_pixels} pixels"
        raise InputError("too_large", message)
