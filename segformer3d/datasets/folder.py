"""Any folder of frames with their classes and depths: `images/`, `class_ids/` and `depth/`.

`class_ids/` holds 8-bit PNGs, `depth/` 16-bit PNGs (metres = value / 256, as in KITTI; Uhrig et al.
2017) or .npy files of metres. A frame's files share their path below these folders, apart from the
ending; a frame may lack either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from segformer3d.datasets import reading
from segformer3d.datasets.sample import (
    COARSE_GROUPS,
    IDENTITY_GROUPS,
    DatasetError,
    DepthKind,
    Sample,
)
from segformer3d.labels import BDD100K_TO_TRAIN_ID, CAMVID_TO_TRAIN_ID, LABEL_ID_TO_TRAIN_ID

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LABELS: Final = ("train_ids", "label_ids", "camvid", "bdd100k")

_TABLES: Final = {
    "label_ids": LABEL_ID_TO_TRAIN_ID,
    "camvid": CAMVID_TO_TRAIN_ID,
    "bdd100k": BDD100K_TO_TRAIN_ID,
}


class Folder:
    """The frames of one folder."""

    def __init__(self, root: Path, labels: str = "train_ids") -> None:
        """List the folder.

        Args:
            root: Holds `images/` and beside it `class_ids/`, `depth/` or both.
            labels: What the numbers in `class_ids/` are: one of `LABELS`.

        Raises:
            DatasetError: It holds no frames, two of one name, or nothing that is known of any.
        """
        if labels not in LABELS:
            raise DatasetError(f"labels must be one of {', '.join(LABELS)}, not {labels!r}")
        self._root = root
        self._kind = labels
        self.groups = COARSE_GROUPS if labels == "camvid" else IDENTITY_GROUPS
        self._images = self._list()
        known = [(self._class_ids(stem), self._depth(stem)) for stem in self._images]
        has_depth = any(depth is not None for _, depth in known)
        self.depth_kind: DepthKind = "metric" if has_depth else "none"
        if not has_depth and not any(ids is not None for ids, _ in known):
            raise DatasetError(
                f"{root}: no class_ids/*.png and no depth/*.png or *.npy of the images' names; "
                "use pictures: for frames without labels"
            )
        self._stems = list(self._images)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._stems)

    def __getitem__(self, index: int) -> Sample:
        """Read one frame with what is known of it.

        Raises:
            DatasetError: One of its files is unreadable, or of another size than the image.
        """
        stem = self._stems[index]
        path = self._images[stem]
        labels, depth = self._class_ids(stem), self._depth(stem)
        sample = Sample(
            stem,
            reading.picture(path),
            None if labels is None else self._read_class_ids(labels),
            None if depth is None else _read_depth(depth),
        )
        return reading.checked(sample, path)

    def _list(self) -> dict[str, Path]:
        """Give the pictures by their path without its ending, in order."""
        folder = self._root / "images"
        files = [
            path for path in folder.rglob("*") if path.suffix.lower() in reading.PICTURE_SUFFIXES
        ]
        images: dict[str, Path] = {}
        for path in sorted(files):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in images:
                raise DatasetError(f"{path}: {images[stem].name} has the same name: rename one")
            images[stem] = path
        if not images:
            raise DatasetError(f"{folder}: no {', '.join(reading.PICTURE_SUFFIXES)} in it")
        return images

    def _class_ids(self, stem: str) -> Path | None:
        return _existing(self._root / "class_ids" / f"{stem}.png")

    def _depth(self, stem: str) -> Path | None:
        folder = self._root / "depth"
        return _existing(folder / f"{stem}.png") or _existing(folder / f"{stem}.npy")

    def _read_class_ids(self, path: Path) -> NDArray[np.uint8]:
        values = reading.plane(path, np.uint8)
        if self._kind == "train_ids":
            return reading.checked_train_ids(values, path)
        return np.asarray(_TABLES[self._kind][values], np.uint8)


def _read_depth(path: Path) -> NDArray[np.float32]:
    return reading.array_depth(path) if path.suffix == ".npy" else reading.kitti_depth(path)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
