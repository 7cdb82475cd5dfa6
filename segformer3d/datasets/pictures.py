"""Frames without labels: pictures of a folder, and frames of videos, to distil from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import av
import numpy as np

from segformer3d.datasets import reading
from segformer3d.datasets.sample import IDENTITY_GROUPS, DatasetError, DepthKind, Sample

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

VIDEOS = (".mp4", ".mkv", ".mov")

# Playlists, which name further files, are not in the list.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"


class Pictures:
    """All pictures below a folder, and every `stride`-th frame of the videos, kept in memory."""

    groups = IDENTITY_GROUPS
    depth_kind: DepthKind = "none"

    def __init__(self, root: Path, stride: int = 1) -> None:
        """Find the pictures and read the videos.

        Raises:
            DatasetError: There are none, or a video cannot be read.
        """
        files = sorted(path for path in root.rglob("*") if path.is_file())
        self._pictures = [path for path in files if path.suffix.lower() in reading.PICTURE_SUFFIXES]
        videos = [path for path in files if path.suffix.lower() in VIDEOS]
        self._frames = [frame for path in videos for frame in _frames(path, stride)]
        if not self._pictures and not self._frames:
            suffixes = ", ".join((*reading.PICTURE_SUFFIXES, *VIDEOS))
            raise DatasetError(f"{root}: no {suffixes} in it")

    def __len__(self) -> int:
        """Number of pictures and frames."""
        return len(self._pictures) + len(self._frames)

    def __getitem__(self, index: int) -> Sample:
        """Read one picture; the frames of videos come after the pictures.

        Raises:
            DatasetError: It cannot be read.
        """
        if index < len(self._pictures):
            path = self._pictures[index]
            return Sample(path.name, reading.picture(path))
        index -= len(self._pictures)
        name, frame = self._frames[index]
        return Sample(name, frame)


def _frames(path: Path, stride: int) -> list[tuple[str, NDArray[np.uint8]]]:
    options = {"format_whitelist": _FORMATS}
    try:
        with av.open(str(path), options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise DatasetError(f"{path}: there is no video stream")
            return [
                (f"{path.name}/{index}", _upright(frame))
                for index, frame in enumerate(container.decode(video=0))
                if index % stride == 0
            ]
    except av.FFmpegError as error:
        raise DatasetError(f"{path}: no readable video ({error.strerror})") from None


def _upright(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """The frame's pixels, turned as the container says: by multiples of 90 degrees."""
    turns = round(frame.rotation / 90)
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns), np.uint8)
