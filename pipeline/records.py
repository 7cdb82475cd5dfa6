"""The frozen records that cross a boundary: planner to worker, stage to stage, worker to driver.

A shard travels as one Arrow row. Pixels ride in one ``large_binary`` value, which reads back as a
view of the buffer without a copy, whatever its length.

Shape legend: T frames of a shard that decoded, h and w the model's input size in pixels.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
class DecodedShard:
    """What decode gives annotate.

    Attributes:
        shard_id: The shard.
        frames: Every planned frame, in plan order.
        pixels: uint8 ``(T, h, w, 3)`` RGB of the frames without error, in the same order; may be
            a read-only view.
        decode_s: Seconds spent decoding.
    """

    shard_id: int
    frames: tuple[FrameRecord, ...]
    pixels: UInt8Array
    decode_s: float = 0.0

    @property
    def good_places(self) -> list[int]:
        """Places among all frames of those that have pixels."""
        return [place for place, frame in enumerate(self.frames) if frame.error_kind is None]

    def to_table(self) -> pa.Table:
        """One Arrow row; the pixels are not copied."""
        head = {
            "shard_id": self.shard_id,
            "frames": [vars(frame) for frame in self.frames],
            "pixels": list(self.pixels.shape),
            "decode_s": self.decode_s,
        }
        return _row(head, pixels=self.pixels)

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Inverse of ``to_table``; the pixels are a read-only view of the table's buffer."""
        head = _head(table)
        pixels = _view(table, "pixels", np.uint8).reshape(head["pixels"])
        return cls(
            shard_id=head["shard_id"],
            frames=_frames(head["frames"]),
            pixels=pixels,
            decode_s=head["decode_s"],
        )


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
class AnnotatedShard:
    """What annotate gives publish.

    Attributes:
        shard_id: The shard.
        frames: Every planned frame, in plan order.
        class_ids: uint8 ``(height, width)`` train ids of each good frame, at the model's input
            size or at the asset's; None if the weights lack the head.
        depth: uint16 ``(h/4, w/4)`` depth codes of each good frame, 0 invalid; None likewise.
        certainty: One per good frame.
        depth_codec: How depth codes read, as `DepthCodec.to_dict` gives it; None likewise.
        decode_s: Seconds spent decoding.
        annotate_s: Seconds spent in the model.
    """

    shard_id: int
    frames: tuple[FrameRecord, ...]
    class_ids: tuple[UInt8Array, ...] | None
    depth: tuple[UInt16Array, ...] | None
    certainty: tuple[Certainty, ...]
    depth_codec: dict[str, Any] | None = None
    decode_s: float = 0.0
    annotate_s: float = 0.0

    def to_table(self) -> pa.Table:
        """One Arrow row."""
        head = {
            "shard_id": self.shard_id,
            "frames": [vars(frame) for frame in self.frames],
            "certainty": [vars(item) for item in self.certainty],
            "depth_codec": self.depth_codec,
            "class_ids": _shapes(self.class_ids),
            "depth": _shapes(self.depth),
            "seconds": [self.decode_s, self.annotate_s],
        }
        return _row(head, class_ids=_flat(self.class_ids), depth=_flat(self.depth))

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Inverse of ``to_table``; the arrays are read-only views."""
        head = _head(table)
        return cls(
            shard_id=head["shard_id"],
            frames=_frames(head["frames"]),
            class_ids=_split(_view(table, "class_ids", np.uint8), head["class_ids"]),
            depth=_split(_view(table, "depth", np.uint16), head["depth"]),
            certainty=tuple(Certainty(**item) for item in head["certainty"]),
            depth_codec=head["depth_codec"],
            decode_s=head["seconds"][0],
            annotate_s=head["seconds"][1],
        )


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


@dataclass(frozen=True, kw_only=True)
class ShardReceipt:
    """What a worker reports when a shard is decided.

    Attributes:
        shard_id: The shard.
        won: Whether this attempt's commit is the one that counts.
        num_rows: Rows of the winning attempt.
        num_ok: Good rows of it.
        size_bytes: Bytes of its data files.
        decode_s: Seconds spent decoding.
        annotate_s: Seconds spent in the model.
        publish_s: Seconds spent encoding and writing.
    """

    shard_id: int
    won: bool
    num_rows: int
    num_ok: int
    size_bytes: int
    decode_s: float = 0.0
    annotate_s: float = 0.0
    publish_s: float = 0.0

    def to_table(self) -> pa.Table:
        """One Arrow row."""
        return pa.Table.from_pylist([asdict(self)], schema=RECEIPT_SCHEMA)

    @classmethod
    def all_from_table(cls, table: pa.Table) -> list[Self]:
        """Inverse of ``to_table``, for any number of rows."""
        return [cls(**row) for row in table.to_pylist()]


def canonical_json(value: object) -> bytes:
    """Sorted keys, no spaces, UTF-8: the form that hashes and create-only objects use."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


_SLICE = pa.struct(
    [
        pa.field("asset", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("frame_index", pa.list_(pa.int64()), nullable=False),
        pa.field("pts", pa.list_(pa.int64()), nullable=False),
        pa.field("pts_s", pa.list_(pa.float64()), nullable=False),
        pa.field("seek_pts", pa.int64()),
        pa.field("captured_at_us", pa.int64()),
        pa.field("latitude", pa.float64()),
        pa.field("longitude", pa.float64()),
        pa.field("error_kind", pa.string()),
        pa.field("error", pa.string()),
        pa.field("container", pa.string()),
        pa.field("offset", pa.int64(), nullable=False),
    ]
)
PLAN_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.int64(), nullable=False),
        pa.field("root", pa.string(), nullable=False),
        pa.field("input_width_px", pa.int32(), nullable=False),
        pa.field("input_height_px", pa.int32(), nullable=False),
        pa.field("slices", pa.list_(_SLICE), nullable=False),
    ]
)

RECEIPT_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.int64(), nullable=False),
        pa.field("won", pa.bool_(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_ok", pa.int64(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("decode_s", pa.float64(), nullable=False),
        pa.field("annotate_s", pa.float64(), nullable=False),
        pa.field("publish_s", pa.float64(), nullable=False),
    ]
)


def shards_to_table(shards: Sequence[ShardSpec]) -> pa.Table:
    """Shards as a table of ``PLAN_SCHEMA``, one row each."""
    return pa.Table.from_pylist([shard.fields() for shard in shards], schema=PLAN_SCHEMA)


def shards_from_table(table: pa.Table) -> list[ShardSpec]:
    """Inverse of ``shards_to_table``."""
    return [_shard(row) for row in table.to_pylist()]


def _shard(row: Mapping[str, Any]) -> ShardSpec:
    slices = tuple(
        Slice(
            **{
                **part,
                "frame_index": tuple(part["frame_index"]),
                "pts": tuple(part["pts"]),
                "pts_s": tuple(part["pts_s"]),
            }
        )
        for part in row["slices"]
    )
    return ShardSpec(**{**row, "slices": slices})


def _row(head: dict[str, Any], **arrays: npt.NDArray[Any]) -> pa.Table:
    columns = {"head": pa.array([json.dumps(head)], pa.string())}
    columns |= {name: _binary(array) for name, array in arrays.items()}
    return pa.table(columns)


def _binary(array: npt.NDArray[Any]) -> pa.Array:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    offsets = pa.py_buffer(np.array([0, flat.nbytes], np.int64).tobytes())
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(flat)])


def _head(table: pa.Table) -> dict[str, Any]:
    if table.num_rows != 1:
        message = f"a shard travels as one row, got {table.num_rows}"
        raise ValueError(message)
    return cast("dict[str, Any]", json.loads(table.column("head")[0].as_py()))


def _view(table: pa.Table, column: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
    (chunk,) = (piece for piece in table.column(column).chunks if len(piece))
    # Through the buffers: a pyarrow scalar would copy the bytes.
    _, offsets, data = chunk.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + 2]
    if start == stop:
        return np.empty(0, dtype)
    return np.frombuffer(data, np.uint8)[start:stop].view(dtype)


def _frames(items: Sequence[Mapping[str, Any]]) -> tuple[FrameRecord, ...]:
    return tuple(FrameRecord(**item) for item in items)


def _shapes(arrays: Sequence[npt.NDArray[Any]] | None) -> list[list[int]] | None:
    return None if arrays is None else [list(array.shape) for array in arrays]


def _flat(arrays: Sequence[npt.NDArray[Any]] | None) -> npt.NDArray[Any]:
    if not arrays:
        return np.empty(0, np.uint8)
    if _are_neighbours(arrays):
        # What a model says of a whole shard is one block already: a copy would cost a sixth of a
        # millisecond a frame, while the GPU waits.
        count = sum(array.size for array in arrays)
        return np.lib.stride_tricks.as_strided(arrays[0].reshape(-1), (count,), writeable=False)
    return np.concatenate([array.reshape(-1) for array in arrays])


def _are_neighbours(arrays: Sequence[npt.NDArray[Any]]) -> bool:
    """Whether arrays are contiguous parts of one that holds them, one right after the other."""
    owner = arrays[0].base
    if owner is None or not all(array.base is owner for array in arrays):
        return False
    begins = [array.__array_interface__["data"][0] for array in arrays]
    ends = [begin + array.nbytes for begin, array in zip(begins, arrays, strict=True)]
    return begins[1:] == ends[:-1] and all(array.flags.c_contiguous for array in arrays)


def _split(
    flat: npt.NDArray[Any], shapes: Sequence[Sequence[int]] | None
) -> tuple[npt.NDArray[Any], ...] | None:
    if shapes is None:
        return None
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes]).tolist()
    return tuple(
        flat[end - int(np.prod(shape)) : end].reshape(shape)
        for shape, end in zip(shapes, ends, strict=True)
    )
