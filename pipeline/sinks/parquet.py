"""One Parquet object per attempt at a shard: the schema, and a shard's rows in it.

The schema's metadata carries the key ``huggingface`` so that `datasets` decodes both image columns,
and the key ``segformer3d`` with what a reader needs to interpret them.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.encode import encode_png, resize_depth_codes
from pipeline.errors import DAMAGE
from pipeline.records import FrameRecord
from pipeline.statistics import frame_statistics
from pipeline.tables import AnnotatedShard
from segformer3d.config import DepthCodec
from segformer3d.labels import NUM_CLASSES

METADATA_KEY = b"segformer3d"
_PNG = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])

SCHEMA = pa.schema(
    [
        pa.field("frame_id", pa.string(), nullable=False),
        pa.field("asset", pa.string(), nullable=False),
        pa.field("frame_index", pa.int64(), nullable=False),
        pa.field("pts_s", pa.float64()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_kind", pa.string()),
        pa.field("error", pa.string()),
        pa.field("class_ids", _PNG),
        pa.field("depth", _PNG),
        pa.field("class_fraction", pa.list_(pa.float32(), NUM_CLASSES)),
        pa.field("confidence_mean", pa.float32()),
        pa.field("entropy_mean", pa.float32()),
        pa.field("depth_p05_m", pa.float32()),
        pa.field("depth_p50_m", pa.float32()),
        pa.field("depth_p95_m", pa.float32()),
        pa.field("captured_at", pa.timestamp("us", tz="UTC")),
        pa.field("latitude", pa.float64()),
        pa.field("longitude", pa.float64()),
    ]
)
# What any file may unpack to.
_UNPACKED_BYTES = 256 << 20
_MOST_TIMES = 64
_MOST_ROWS_AT_A_TIME = 64
_UNCOMPRESSED = ("class_ids.bytes", "depth.bytes")


def frame_id(asset: str, frame_index: int) -> str:
    """Identity of a frame within an archive: xxh3-128 of the asset's path, NUL, and the index."""
    return xxhash.xxh3_128_hexdigest(f"{asset}\0{frame_index}".encode())


def encode_shard(
    shard: AnnotatedShard, metadata: Mapping[str, object], *, depth_at_asset_size: bool = False
) -> bytes:
    """A shard as the bytes of a Parquet file, one row per planned frame.

    Args:
        shard: What the model said.
        metadata: Stored as JSON under ``segformer3d`` in the schema's metadata.
        depth_at_asset_size: Whether depth is resized from the network's grid first, bilinearly
            among valid pixels.

    Returns:
        The file, with page index; PNG bytes uncompressed, all else zstd.
    """
    rows = list(_rows(shard, depth_at_asset_size=depth_at_asset_size))
    table = pa.Table.from_pylist(rows, schema=_schema(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression=_compression(),
        use_dictionary=["asset", "status", "error_kind"],
        write_page_index=True,
    )
    return cast("bytes", sink.getvalue().to_pybytes())


def read_rows(data: bytes, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of such a file.

    Raises:
        ValueError: If the bytes are no Parquet file.
    """
    return cast("list[dict[str, Any]]", parse_parquet(data, columns).to_pylist())


def parse_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table of a whole Parquet file.

    Raises:
        ValueError: If the bytes are none, or would fill the memory; the message is one line.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        _check_weight(file.metadata, len(data))
        return _read(file, columns, max(_UNPACKED_BYTES, _MOST_TIMES * len(data)))
    except (pa.ArrowException, *DAMAGE) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(message) from error


def _check_weight(metadata: pq.FileMetaData, num_bytes: int) -> None:
    """Refuse a small file that says that it is a large table; ours are not packed like that."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    unpacked = sum(group.total_byte_size for group in groups)
    most = max(_UNPACKED_BYTES, _MOST_TIMES * num_bytes)
    if metadata.num_rows > num_bytes or unpacked > most:
        message = f"{num_bytes} bytes that say they are {metadata.num_rows} rows, {unpacked} bytes"
        raise ValueError(message)


def _read(file: pq.ParquetFile, columns: list[str] | None, most_bytes: int) -> pa.Table:
    """The rows, a few at a time: what a footer says of a dictionary says nothing of its rows."""
    groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
    heaviest = max((group.total_byte_size for group in groups), default=0)
    at_a_time = max(1, min(_MOST_ROWS_AT_A_TIME, _UNPACKED_BYTES // max(1, heaviest)))
    batches, num_bytes = [], 0
    for batch in file.iter_batches(at_a_time, columns=columns, use_threads=False):
        num_bytes += batch.nbytes
        if num_bytes > most_bytes:
            message = f"its rows unpack to more than {most_bytes} bytes"
            raise ValueError(message)
        batches.append(batch)
    if not batches:
        return file.read(columns=columns)
    return pa.Table.from_batches(batches).combine_chunks()


def _rows(shard: AnnotatedShard, *, depth_at_asset_size: bool) -> Iterator[dict[str, Any]]:
    good = 0
    codec = DepthCodec.from_dict(shard.depth_codec) if shard.depth_codec else None
    for frame in shard.frames:
        row = _identity(frame)
        if frame.error_kind is None:
            size = (frame.width, frame.height) if depth_at_asset_size else None
            row |= _annotation(shard, good, size, codec)
            good += 1
        yield row


def _identity(frame: FrameRecord) -> dict[str, Any]:
    return {
        "frame_id": frame_id(frame.asset, frame.frame_index),
        "asset": frame.asset,
        "frame_index": frame.frame_index,
        "pts_s": frame.pts_s,
        "width": frame.width,
        "height": frame.height,
        "status": "ok" if frame.error_kind is None else "error",
        "error_kind": frame.error_kind,
        "error": frame.error,
        "captured_at": frame.captured_at_us,
        "latitude": frame.latitude,
        "longitude": frame.longitude,
    }


def _annotation(
    shard: AnnotatedShard,
    good: int,
    depth_size: tuple[int, int] | None,
    codec: DepthCodec | None,
) -> dict[str, Any]:
    class_ids = None if shard.class_ids is None else shard.class_ids[good]
    depth = None if shard.depth is None else shard.depth[good]
    statistics = frame_statistics(shard.certainty[good], class_ids, depth, codec)
    row: dict[str, Any] = {
        "class_fraction": statistics.class_fraction,
        "confidence_mean": statistics.confidence_mean,
        "entropy_mean": statistics.entropy_mean,
        "depth_p05_m": statistics.depth_p05_m,
        "depth_p50_m": statistics.depth_p50_m,
        "depth_p95_m": statistics.depth_p95_m,
    }
    if class_ids is not None:
        row["class_ids"] = {"bytes": encode_png(class_ids), "path": None}
    if depth is not None:
        if depth_size is not None:
            depth = resize_depth_codes(depth, depth_size)
        row["depth"] = {"bytes": encode_png(depth), "path": None}
    return row


def _schema(metadata: Mapping[str, object]) -> pa.Schema:
    features = {field.name: _feature(field.type) for field in SCHEMA}
    return SCHEMA.with_metadata(
        {
            b"huggingface": json.dumps({"info": {"features": features}}).encode(),
            METADATA_KEY: json.dumps(metadata, sort_keys=True).encode(),
        }
    )


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_struct(kind):
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        value = {"dtype": "float32", "_type": "Value"}
        return {"feature": value, "length": kind.list_size, "_type": "List"}
    names = {"double": "float64", "float": "float32"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}


def _compression() -> dict[str, str]:
    nested = {"class_ids": ("bytes", "path"), "depth": ("bytes", "path")}
    codecs: dict[str, str] = {}
    for field in SCHEMA:
        leaves = [f"{field.name}.{leaf}" for leaf in nested.get(field.name, ())]
        if pa.types.is_fixed_size_list(field.type):
            leaves = [f"{field.name}.list.element"]
        for leaf in leaves or [field.name]:
            codecs[leaf] = "none" if leaf in _UNCOMPRESSED else "zstd"
    return codecs
