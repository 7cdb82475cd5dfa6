"""CamVid (Brostow et al. 2009) in the split and the 12 values of SegNet: images/ and labels/."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from segformer3d.datasets import reading
from segformer3d.datasets.ground_plane import ground_plane_depth, road_top
from segformer3d.datasets.sample import COARSE_GROUPS, DatasetError, DepthKind, Sample
from segformer3d.labels import CAMVID_TO_TRAIN_ID

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


FOCAL_WIDTHS = 0.9  # CamVid's camera, about
HORIZON_PERCENTILE = 5  # in some frames of a drive the road is seen nearly to the horizon
HORIZON_ABOVE_ROAD = 0.011  # of the height: the last stretch of a road is too thin to be labelled


class CamVid:
    """One split: `ROOT/SPLIT/images/*.jpg|png` and `ROOT/SPLIT/labels/*.png`."""

    groups = COARSE_GROUPS
    # A guess from labels is learned from, never measured with.
    depth_kind: DepthKind = "none"

    def __init__(self, root: Path, split: str, *, ground_depth_m: float | None = None) -> None:
        """List the split.

        Args:
            root: The folder of the splits.
            split: Its name.
            ground_depth_m: The camera's height above the road, to guess depths from the labels
                by (`ground_plane`); None gives no depth.

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
        self._camera_m = ground_depth_m
        self._horizons = self._find_horizons() if ground_depth_m is not None else {}

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """Read one frame with its classes.

        Raises:
            DatasetError: One of its files is unreadable, or of another size than the image.
        """
        path = self._images[index]
        ids = self._class_ids(path)
        return reading.checked(
            Sample(path.stem, reading.picture(path), ids, self._guessed_depth(path, ids)), path
        )

    def _class_ids(self, image: Path) -> NDArray[np.uint8]:
        ids: NDArray[np.uint8] = CAMVID_TO_TRAIN_ID[reading.plane(self._label(image), np.uint8)]
        return ids

    def _guessed_depth(self, image: Path, ids: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        if self._camera_m is None:
            return None
        height, width = ids.shape
        return ground_plane_depth(
            ids,
            horizon_px=self._horizons[_drive(image)] * height,
            focal_px=FOCAL_WIDTHS * width,
            height_m=self._camera_m,
        )

    def _find_horizons(self) -> dict[str, float]:
        """Estimate each drive's horizon, as a share of the height: its camera is fixed."""
        tops: dict[str, list[float]] = {}
        for image in self._images:
            ids = self._class_ids(image)
            top = road_top(ids)
            share = 1.0 if top is None else top / len(ids) - HORIZON_ABOVE_ROAD
            tops.setdefault(_drive(image), []).append(share)
        return {
            drive: float(np.percentile(shares, HORIZON_PERCENTILE))
            for drive, shares in tops.items()
        }

    def _label(self, image: Path) -> Path:
        return self._labels / f"{image.stem}.png"


def _drive(image: Path) -> str:
    """Frames are named `SEQUENCE_FRAME`."""
    return image.stem.rpartition("_")[0]
