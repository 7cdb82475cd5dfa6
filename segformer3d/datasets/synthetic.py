"""The synthetic scenes as a data set: frames of many drives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segformer3d.datasets.sample import IDENTITY_GROUPS, DepthKind, Sample
from segformer3d.files import temporary_beside
from segformer3d.scenes import make_drive, render

if TYPE_CHECKING:
    from collections.abc import Iterable

TIME_MAX_S = 20.0  # by then a drive has passed most of its street
WIDTH_PX, HEIGHT_PX = 640, 360


class Scenes:
    """`count` scenes of the drives from `first_seed` on; exact class ids and metric depth."""

    groups = IDENTITY_GROUPS
    depth_kind: DepthKind = "metric"

    def __init__(
        self,
        first_seed: int,
        count: int,
        *,
        size_px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX),
        per_drive: int = 1,
        cache: Path | None = None,
    ) -> None:
        """Describe the scenes; each is rendered when asked for.

        Args:
            first_seed: Seed of the first scene's drive.
            count: Number of scenes.
            size_px: Width and height.
            per_drive: Frames of each drive, spread over it. Most of a scene's time is spent on
                its drive's surfaces, so with a cache more of them cost little.
            cache: Folder that keeps what was rendered, whole drives at a time.
        """
        self._first_seed = first_seed
        self._per_drive = per_drive
        self._count = count
        self._size = size_px
        self._cache = cache
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """Number of scenes."""
        return self._count

    def __getitem__(self, index: int) -> Sample:
        """Render one scene, or read it from the cache."""
        if not 0 <= index < self._count:
            raise IndexError(f"scene {index} of {self._count}")
        drive, frame = divmod(index, self._per_drive)
        seed = self._first_seed + drive
        if self._cache is None:
            return self._render(seed, [frame])[0]
        path = self._path(seed, frame)
        if not path.exists():
            everything = range(self._per_drive)
            for number, sample in enumerate(self._render(seed, everything)):
                _save(self._path(seed, number), sample)
        with np.load(path, allow_pickle=False) as arrays:
            depth = arrays["depth"].astype(np.float32)
            return Sample(_name(seed, frame), arrays["image"], arrays["class_ids"], depth)

    def _path(self, seed: int, frame: int) -> Path:
        width, height = self._size
        return (
            Path(self._cache or "")
            / f"{_name(seed, frame)}of{self._per_drive}-{width}x{height}.npz"
        )

    def _render(self, seed: int, frames: Iterable[int]) -> list[Sample]:
        drive = make_drive(seed)
        rng = np.random.default_rng([seed, 1])
        times_s = (np.arange(self._per_drive) + rng.random(self._per_drive)) * (
            TIME_MAX_S / self._per_drive
        )
        scenes = ((frame, render(drive, float(times_s[frame]), *self._size)) for frame in frames)
        return [
            Sample(_name(seed, frame), scene.frame, scene.class_ids, scene.depth_m)
            for frame, scene in scenes
        ]


def _name(seed: int, frame: int) -> str:
    return f"{seed}-{frame}"


def _save(path: Path, sample: Sample) -> None:
    """Write one scene; it appears whole or not at all, whoever else writes it."""
    arrays: dict[str, Any] = {"image": sample.image, "class_ids": sample.class_ids}
    if sample.depth is not None:
        arrays["depth"] = sample.depth.astype(np.float16)
    temporary = temporary_beside(path)
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)
