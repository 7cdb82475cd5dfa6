"""The origin project's data: `{images,seg_labels,depth_labels}/{train,val}/*.npy`.

The depth target is 10 times the stored array, an inverse-depth-like map without a unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from segformer3d.datasets import reading
from segformer3d.datasets.sample import IDENTITY_GROUPS, DatasetError, DepthKind, Sample

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

DEPTH_FACTOR = 10.0


class Origin:
    """One split; labels of a frame may be missing."""

    groups = IDENTITY_GROUPS

    def __init__(self, root: Path, split: str) -> None:
        """List the split.

        Raises:
            DatasetError: The folder holds no frames, or no labels for any of them.
        """
        self._labels = root / "seg_labels" / split
        self._depths = root / "depth_labels" / split
        self._images = sorted((root / "images" / split).glob("*.npy"))
        if not self._images:
            raise DatasetError(f"{root / 'images' / split}: no *.npy, as the origin's data have")
        has_depth = any((self._depths / image.name).is_file() for image in self._images)
        self.depth_kind: DepthKind = "relative" if has_depth else "none"
        if not has_depth and not any((self._labels / i.name).is_file() for i in self._images):
            raise DatasetError(f"{self._labels}, {self._depths}: no labels of the images' names")

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """Read one frame with what is known of it.

        Raises:
            DatasetError: One of its files is unreadable, or of another size than the image.
        """
        path = self._images[index]
        labels, depths = self._labels / path.name, self._depths / path.name
        ids = depth = None
        if labels.is_file():
            ids = reading.checked_train_ids(reading.array(labels, 2), labels)
        if depths.is_file():
            depth = reading.array_depth(depths) * np.float32(DEPTH_FACTOR)
        return reading.checked(Sample(path.stem, read_image(path), ids, depth), path)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an RGB image from an .npy file.

    Its type and range say how it is stored: uint8 is taken as it is; other numbers are 0 to 1 if
    none is above 1, and 0 to 255 otherwise.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        DatasetError: It is unreadable, of another shape, not finite, or out of both ranges.
    """
    values = reading.array(path, 3)
    if values.shape[2] != 3:
        raise DatasetError(f"{path}: shape {values.shape}, not (H, W, 3)")
    if values.dtype == np.uint8:
        return np.array(values, np.uint8)
    # One comparison that fails for NaN as well.
    if not ((values >= 0) & (values <= 255)).all():
        raise DatasetError(f"{path}: image values must be 0 to 1, or 0 to 255")
    scale = 255.0 if values.max() <= 1 else 1.0
    return np.rint(values * scale).astype(np.uint8)
