"""The records that travel as Arrow rows: plans, shards from stage to stage, receipts.

A shard travels as one Arrow row. Pixels ride in one ``large_binary`` value, which reads back as a
view of the buffer without a copy, whatever its length.

Shape legend: T frames of a shard that decoded, h and w the model's input size in pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.records import Certainty, FrameRecord, ShardSpec, Slice, UInt8Array, UInt16Array


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
