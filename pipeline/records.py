"""The frozen records that cross a boundary: planner to worker, worker to driver, run to run.

Decoding children import this module and have no need of Arrow: what travels as its rows is in
``pipeline.tables``.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pipeline.errors import ErrorKind
from pipeline.typed import KNOWN_FIELDS_ONLY, from_json

AssetKind = Literal["image", "video", "tar"]
_INT64 = 1 << 63
_DIGEST = re.compile(r"[0-9a-f]{64}")
UInt8Array = npt.NDArray[np.uint8]
UInt16Array = npt.NDArray[np.uint16]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file of an archive, as listed, or a member of a tar file there.

    Attributes:
        path: Path relative to the archive's root, escaped by ``storage.escape_path``; a member's
            is its tar's path, a slash, and its name.
        kind: Whether it is read as a still image, as a video, or for its members.
        size_bytes: Size of the file or of the member.
        etag: Content fingerprint: the store's ETag, or size and a hash of both ends of a file; a
            member has its tar's.
        container: Path of the tar that it is a member of, if it is one.
        offset: Where in the file it begins.
    """

    path: str
    kind: AssetKind
    size_bytes: int
    etag: str
    container: str | None = None
    offset: int = 0

    @property
    def file(self) -> str:
        """Path of the file that holds it."""
        return self.container or self.path


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Frames of one asset within a shard, in presentation order.

    Attributes:
        asset: The asset's path, as in ``Asset.path``.
        kind: As in ``Asset.kind``.
        size_bytes: As in ``Asset.size_bytes``.
        etag: As in ``Asset.etag``.
        container: As in ``Asset.container``.
        offset: As in ``Asset.offset``.
        width: The asset's width in pixels after orientation; 0 if it could not be opened.
        height: The asset's height, likewise.
        frame_index: Rank of each frame in the asset's presentation order; 0 for an image, -1 for
            an asset that cannot be opened at all.
        pts: Presentation time stamp of each frame in ticks of the stream; empty for an image.
        pts_s: The same in seconds; empty for an image.
        seek_pts: Ticks of the keyframe at or before the first frame; None for an image,
            and for a video that is to be read from its beginning.
        captured_at_us: When the asset says it was captured, microseconds since 1970 in UTC; of a
            video, when its time stamps are zero.
        latitude: Where, in degrees north, if it says so.
        longitude: Likewise, in degrees east.
        error_kind: Set if the planner already knows that these frames cannot be read.
        error: The message that goes with it.
    """

    asset: str
    kind: AssetKind
    size_bytes: int
    etag: str
    width: int
    height: int
    frame_index: tuple[int, ...] = (0,)
    pts: tuple[int, ...] = ()
    pts_s: tuple[float, ...] = ()
    seek_pts: int | None = None
    captured_at_us: int | None = None
    latitude: float | None = None
    longitude: float | None = None
    error_kind: ErrorKind | None = None
    error: str | None = None
    container: str | None = None
    offset: int = 0

    @property
    def file(self) -> str:
        """Path of the file that holds the asset."""
        return self.container or self.asset

    def take(self, places: Sequence[int]) -> Self:
        """The same with only the frames at these places."""
        return replace(
            self,
            frame_index=tuple(self.frame_index[place] for place in places),
            pts=tuple(self.pts[place] for place in places) if self.pts else (),
            pts_s=tuple(self.pts_s[place] for place in places) if self.pts_s else (),
        )


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """The planned unit of work and of commit.

    Attributes:
        shard_id: Position in the plan, from 0.
        root: URL of the archive's root, to which the assets' paths are relative.
        input_width_px: Width of the model's input for every frame of the shard.
        input_height_px: Height, likewise.
        slices: The frames, in order.
    """

    shard_id: int
    root: str
    input_width_px: int
    input_height_px: int
    slices: tuple[Slice, ...]

    @property
    def num_frames(self) -> int:
        """Number of planned frames, each of which ends with exactly one outcome."""
        return sum(len(part.frame_index) for part in self.slices)

    def fields(self) -> dict[str, Any]:
        """As ``asdict``, which would copy every tuple of every slice."""
        return vars(self) | {"slices": [dict(vars(part)) for part in self.slices]}


@dataclass(frozen=True, kw_only=True)
class FrameRecord:
    """One planned frame and what became of it so far.

    Attributes:
        asset: The asset's path, as in ``Asset.path``.
        frame_index: Rank in presentation order; 0 for an image, -1 for an unopenable asset.
        pts_s: Presentation time in seconds; None for an image.
        width: The asset's width in pixels after orientation.
        height: The asset's height in pixels after orientation.
        captured_at_us: When the frame was captured, microseconds since 1970 in UTC, if known.
        latitude: Where, in degrees north, if known.
        longitude: Likewise, in degrees east.
        error_kind: None while the frame is good.
        error: The message that goes with it.
    """

    asset: str
    frame_index: int
    pts_s: float | None
    width: int
    height: int
    captured_at_us: int | None = None
    latitude: float | None = None
    longitude: float | None = None
    error_kind: ErrorKind | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """How sure the model is of one frame; None where the segmentation head is lacking.

    Attributes:
        confidence_mean: Mean of the largest class probability.
        entropy_mean: Mean of the class entropy, in nats.
    """

    confidence_mean: float | None = None
    entropy_mean: float | None = None


@dataclass(frozen=True, kw_only=True)
class FrameStatistics:
    """Statistics of one annotated frame; None where the head is lacking or depth is relative."""

    class_fraction: tuple[float, ...] | None = None
    confidence_mean: float | None = None
    entropy_mean: float | None = None
    depth_p05_m: float | None = None
    depth_p50_m: float | None = None
    depth_p95_m: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One object that a commit record names.

    Attributes:
        path: Key relative to the generation's folder.
        size_bytes: Its size.
        sha256: Hex digest of its bytes.
    """

    path: str
    size_bytes: int
    sha256: str

    __pydantic_config__ = KNOWN_FIELDS_ONLY


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """The one object that makes a shard done.

    Attributes:
        shard_id: The shard.
        plan_id: The plan that it belongs to.
        attempt: The attempt that won.
        files: What the attempt wrote.
        num_rows: Rows in those files: one per planned frame.
        num_ok: Rows with status ``ok``.
        quarantined: ``(asset, frame_index, kind, reason)`` of every other row.
    """

    shard_id: int
    plan_id: str
    attempt: str
    files: tuple[DataFile, ...]
    num_rows: int
    num_ok: int
    quarantined: tuple[tuple[str, int, str, str], ...]

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    def to_json(self) -> bytes:
        """Canonical JSON, the same bytes for the same record."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Inverse of ``to_json``.

        Raises:
            ValueError: If the bytes are no commit record.
        """
        try:
            record = from_json(cls, data)
        except ValueError as error:
            message = f"malformed commit record: {error}"
            raise ValueError(message) from error
        if not record.files:
            message = "malformed commit record: it names no data"
            raise ValueError(message)
        if not all(_DIGEST.fullmatch(file.sha256) for file in record.files):
            message = "malformed commit record: a sha256 is none"
            raise ValueError(message)
        numbers = [record.shard_id, record.num_rows, record.num_ok]
        numbers += [file.size_bytes for file in record.files]
        numbers += [index for _, index, _, _ in record.quarantined]
        if not all(abs(number) < _INT64 for number in numbers):
            message = "malformed commit record: a number is out of range"
            raise ValueError(message)
        return record


def canonical_json(value: object) -> bytes:
    """Sorted keys, no spaces, UTF-8: the form that hashes and create-only objects use."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()
