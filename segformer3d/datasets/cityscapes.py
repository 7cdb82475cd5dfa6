"""Cityscapes (Cordts et al., CVPR 2016) in its official layout, with metric depth from disparity.

`leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`, and where they are there
`gtFine/SPLIT/CITY/*_gtFine_labelIds.png`, `disparity/SPLIT/CITY/*_disparity.png` (16 bits) and
`camera/SPLIT/CITY/*_camera.json`.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np

from segformer3d.datasets import reading
from segformer3d.datasets.sample import IDENTITY_GROUPS, DatasetError, DepthKind, Sample
from segformer3d.labels import LABEL_ID_TO_TRAIN_ID

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

DISPARITY_SCALE = 256.0

_IMAGE = "_leftImg8bit.png"


class Cityscapes:
    """One split; a frame without labels, disparity or camera simply lacks that supervision."""

    groups = IDENTITY_GROUPS

    def __init__(self, root: Path, split: str) -> None:
        """List the split.

        Raises:
            DatasetError: The folder holds no frames, or no labels and no depth for any of them.
        """
        self._root = root
        self._split = split
        folder = root / "leftImg8bit" / split
        self._images = sorted(folder.glob(f"*/*{_IMAGE}"))
        if not self._images:
            raise DatasetError(f"{folder}: no CITY/*{_IMAGE}, as Cityscapes has")
        has_depth = any(self._has_depth(image) for image in self._images)
        self.depth_kind: DepthKind = "metric" if has_depth else "none"
        if not has_depth and not any(self._labels(image).is_file() for image in self._images):
            raise DatasetError(
                f"{root}: no gtFine/{split} and no disparity/{split} with camera/{split}: "
                "unpack at least one of them beside leftImg8bit"
            )

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """Read one frame with what is known of it.

        Raises:
            DatasetError: One of its files is unreadable, or of another size than the image.
        """
        path = self._images[index]
        labels = self._labels(path)
        ids = None
        if labels.is_file():
            ids = LABEL_ID_TO_TRAIN_ID[reading.plane(labels, np.uint8)]
        depth = self._depth(path) if self._has_depth(path) else None
        name = f"{path.parent.name}/{path.name.removesuffix(_IMAGE)}"
        return reading.checked(Sample(name, reading.picture(path), ids, depth), path)

    def _depth(self, image: Path) -> NDArray[np.float32]:
        factor = _baseline_times_focal_length(self._beside(image, "camera", ".json"))
        return disparity_to_depth(
            reading.plane(self._beside(image, "disparity", ".png"), np.uint16), factor
        )

    def _has_depth(self, image: Path) -> bool:
        files = self._beside(image, "disparity", ".png"), self._beside(image, "camera", ".json")
        return all(file.is_file() for file in files)

    def _labels(self, image: Path) -> Path:
        return self._sibling(image, "gtFine", "_gtFine_labelIds.png")

    def _beside(self, image: Path, kind: str, suffix: str) -> Path:
        return self._sibling(image, kind, f"_{kind}{suffix}")

    def _sibling(self, image: Path, folder: str, ending: str) -> Path:
        name = image.name.removesuffix(_IMAGE) + ending
        return self._root / folder / self._split / image.parent.name / name


def disparity_to_depth(codes: NDArray[np.uint16], factor: float) -> NDArray[np.float32]:
    """Turn Cityscapes' disparity codes into depth.

    The data set's README: d = (code - 1) / 256 for code > 0, and depth = baseline * fx / d.

    Args:
        codes: uint16 (H, W); 0 is unknown, 1 is a disparity of zero.
        factor: Baseline in metres times focal length in pixels.

    Returns:
        float32 (H, W), metres; 0 where unknown or infinitely far.
    """
    disparity = (codes.astype(np.float32) - 1) / np.float32(DISPARITY_SCALE)
    depth = np.zeros(codes.shape, np.float32)
    np.divide(np.float32(factor), disparity, out=depth, where=disparity > 0)
    return depth


def _baseline_times_focal_length(path: Path) -> float:
    try:
        camera = json.loads(path.read_bytes())
        factor = float(camera["extrinsic"]["baseline"]) * float(camera["intrinsic"]["fx"])
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"{path}: no camera file with extrinsic.baseline and intrinsic.fx"
        raise DatasetError(message) from None
    if not 0 < factor < math.inf:
        raise DatasetError(f"{path}: baseline times fx is {factor}, which no camera has")
    return factor
