"""CamVid (Brostow et al. 2009) in the split and the 12 values of SegNet: images/ and labels/."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from segformer3d.datasets import reading
from segformer3d.datasets.sample import COARSE_GROUPS, DatasetError, DepthKind, Sample
from segformer3d.labels import CAMVID_TO_TRAIN_ID

if TYPE_CHECKING:
    from pathlib import Path


class CamVid:
    """One split: `ROOT/SPLIT/images/*.jpg|png` and `ROOT/SPLIT/labels/*.png`."""

    groups = COARSE_GROUPS
    depth_kind: DepthKind = "none"

    def __init__(self, root: Path, split: str) -> None:
        """List the split.

        Raises:
            DatasetError: The folder holds no frames, or one has no labels.
        """
        folder = root / split
        self._labels = folder / "labels"
        images = sorted([*folder.glob("images/*.jpg"), *folder.glob("images/*.png")])
        if not images:
            raise DatasetError(f"{folder}: no images/*.jpg or *.png, as CamVid has")
        for image in images:
            if not self._label(image).is_file():
                raise DatasetError(f"{self._label(image)}: missing, though {image.name} is there")
        self._images = images

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """Read one frame with its classes.

        Raises:
            DatasetError: One of its files is unreadable, or of another size than the image.
        """
        path = self._images[index]
        ids = CAMVID_TO_TRAIN_ID[reading.plane(self._label(path), np.uint8)]
        return reading.checked(Sample(path.stem, reading.picture(path), ids), path)

    def _label(self, image: Path) -> Path:
        return self._labels / f"{image.stem}.png"
