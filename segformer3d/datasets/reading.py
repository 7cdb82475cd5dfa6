"""Reading the files of a data set; whatever is wrong with one is a `DatasetError` that names it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from segformer3d.datasets.sample import DatasetError, Sample
from segformer3d.labels import IGNORE_ID, NUM_CLASSES

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
KITTI_SCALE = 256.0  # codes per metre of 16-bit depth pictures (Uhrig et al. 2017)


def picture(path: Path) -> NDArray[np.uint8]:
    """Read a picture as uint8 (H, W, 3) RGB, turned as its EXIF says.

    Raises:
        DatasetError: It cannot be read or decoded.
    """
    return np.asarray(_decoded(path, cv2.IMREAD_COLOR_RGB), np.uint8)


def plane(path: Path, dtype: type[np.uint8 | np.uint16]) -> NDArray[Any]:
    """Read a single-channel picture of that type, (H, W), as it is.

    Raises:
        DatasetError: It cannot be read or decoded, or has other pixels.
    """
    values = _decoded(path, cv2.IMREAD_UNCHANGED)
    if values.ndim != 2:
        raise DatasetError(f"{path}: {values.shape[2]} channels, though one is needed")
    if values.dtype != dtype:
        raise DatasetError(f"{path}: {values.dtype} pixels, though {np.dtype(dtype)} are needed")
    return values


def array(path: Path, num_dimensions: int) -> NDArray[Any]:
    """Open an .npy file of numbers as a read-only view; a last axis of 1 too many is dropped.

    Raises:
        DatasetError: It cannot be read, or holds something else.
    """
    try:
        # Mapped: a header that promises more than the file holds costs no memory; no pickles.
        values: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, EOFError, SyntaxError, OverflowError) as error:
        raise DatasetError(f"{path}: no readable .npy file ({_line(error)})") from None
    if values.dtype.kind not in "biuf":
        raise DatasetError(f"{path}: no .npy file of plain numbers")
    if values.ndim == num_dimensions + 1 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != num_dimensions or 0 in values.shape:
        raise DatasetError(f"{path}: shape {values.shape}, not {num_dimensions} dimensions")
    return np.asarray(values)


def kitti_depth(path: Path) -> NDArray[np.float32]:
    """Read a 16-bit depth picture, metres = value / 256, as float32 (H, W), 0 where unknown.

    Raises:
        DatasetError: It cannot be read, or is no such picture.
    """
    return np.asarray(plane(path, np.uint16) / np.float32(KITTI_SCALE), np.float32)


def array_depth(path: Path) -> NDArray[np.float32]:
    """Read an .npy file of depths as float32 (H, W); zero and below is unknown and becomes 0.

    Raises:
        DatasetError: It cannot be read, or a depth is not finite.
    """
    with np.errstate(over="ignore"):
        values = array(path, 2).astype(np.float32)
    if not np.isfinite(values).all():
        raise DatasetError(f"{path}: depths that are not finite; write 0 where unknown")
    return np.maximum(values, np.float32(0))


def checked_train_ids(values: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """Take whole numbers as train ids: 0 to 18, 255 or -1 where unknown.

    Args:
        values: Numbers of any type (H, W).
        path: Named in the error.

    Returns:
        uint8 (H, W).

    Raises:
        DatasetError: There is another number among them.
    """
    unknown = (values == IGNORE_ID) | (values == -1)
    known = (values >= 0) & (values < NUM_CLASSES) & (values == np.floor(values))
    if not (known | unknown).all():
        stranger = values[~(known | unknown)].flat[0]
        raise DatasetError(
            f"{path}: {stranger} is no train id (0 to {NUM_CLASSES - 1}, {IGNORE_ID} for unknown)"
        )
    return np.where(unknown, IGNORE_ID, values).astype(np.uint8)


def checked(sample: Sample, path: Path) -> Sample:
    """Return the sample if its labels have the size of its image.

    Args:
        sample: What was read.
        path: File of the image; named in the error.

    Raises:
        DatasetError: They have not.
    """
    height, width = sample.image.shape[:2]
    for name, labels in (("class ids", sample.class_ids), ("depth", sample.depth)):
        if labels is not None and labels.shape != (height, width):
            size = " x ".join(str(side) for side in labels.shape[::-1])
            raise DatasetError(f"{path}: {width} x {height}, but its {name} are {size}")
    return sample


def _decoded(path: Path, flags: int) -> NDArray[Any]:
    try:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except cv2.error:
        # Empty files, and sizes beyond what the decoder allows.
        pixels = None
    if pixels is None:
        raise DatasetError(f"{path}: no readable picture")
    return np.asarray(pixels)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
