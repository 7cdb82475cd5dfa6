"""Parquet that every reader opens as it is, and a PNG tree that mirrors the archive."""

import io
import json

import cv2
import datasets
import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.encode import decode_class_ids, decode_depth, resize_class_ids, resize_depth_codes
from pipeline.layout import Generation
from pipeline.sinks.parquet import SCHEMA, encode_shard, frame_id, parse_parquet, read_rows
from pipeline.sinks.png import write_png_tree
from pipeline.storage import open_store
from tests.shards import annotated_shard

DESIGN_COLUMNS = [
    "frame_id",
    "asset",
    "frame_index",
    "pts_s",
    "width",
    "height",
    "status",
    "error_kind",
    "error",
    "class_ids",
    "depth",
    "class_fraction",
    "confidence_mean",
    "entropy_mean",
    "depth_p05_m",
    "depth_p50_m",
    "depth_p95_m",
    "captured_at",
    "latitude",
    "longitude",
]


@pytest.fixture
def shard():
    return annotated_shard()


@pytest.fixture
def parquet(tmp_path, shard):
    path = tmp_path / "shard.parquet"
    path.write_bytes(encode_shard(shard, {"plan_id": "p"}))
    return path


def test_columns_are_those_of_the_design():
    assert SCHEMA.names == DESIGN_COLUMNS


def test_pyarrow_reads_rows(parquet, shard):
    table = pq.read_table(parquet)
    assert table.schema.names == DESIGN_COLUMNS
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert rows[1]["error_kind"] == "corrupt"
    assert rows[1]["class_ids"] is None
    assert rows[1]["class_fraction"] is None
    assert np.array_equal(decode_class_ids(rows[2]["class_ids"]["bytes"]), shard.class_ids[1])
    assert np.array_equal(decode_depth(rows[2]["depth"]["bytes"]), shard.depth[1])
    assert rows[0]["frame_id"] == frame_id("drive/a.mp4", 0)
    assert json.loads(table.schema.metadata[b"segformer3d"]) == {"plan_id": "p"}


def test_png_bytes_are_not_compressed_again(parquet):
    group = pq.ParquetFile(parquet).metadata.row_group(0)
    codecs = {
        group.column(i).path_in_schema: group.column(i).compression
        for i in range(group.num_columns)
    }
    assert codecs["class_ids.bytes"] == codecs["depth.bytes"] == "UNCOMPRESSED"
    assert codecs["asset"] == codecs["class_fraction.list.element"] == "ZSTD"
    assert group.column(0).has_offset_index


def test_datasets_decodes_both_images(parquet, shard, tmp_path):
    loaded = datasets.Dataset.from_parquet(str(parquet), cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["class_ids"], datasets.Image)
    assert isinstance(loaded.features["depth"], datasets.Image)
    assert np.array_equal(np.array(loaded[0]["class_ids"]), shard.class_ids[0])
    assert np.array_equal(np.array(loaded[2]["depth"]), shard.depth[1])
    assert loaded[1]["depth"] is None


def test_duckdb_reads_it(parquet, shard):
    query = "select count(*), avg(depth_p50_m), sum(octet_length(class_ids.bytes)) from '{}'"
    with duckdb.connect() as connection:
        count, depth, size = connection.execute(query.format(parquet)).fetchone()
    medians_m = [np.median(codes[codes > 0]) / 256 for codes in shard.depth]
    assert (count, depth) == (3, pytest.approx(np.mean(medians_m), rel=1e-5))
    assert size > 0


def test_polars_reads_it(parquet, shard):
    frame = pl.read_parquet(parquet).filter(pl.col("status") == "ok")
    assert frame.height == 2
    data = frame["class_ids"].struct.field("bytes")[0]
    assert np.array_equal(decode_class_ids(data), shard.class_ids[0])


def test_frame_ids_do_not_collide():
    assert frame_id("a1", 2) != frame_id("a", 12)


def test_a_lacking_head_gives_nulls(shard):
    bare = annotated_shard()
    object.__setattr__(bare, "depth", None)
    rows = read_rows(encode_shard(bare, {}))
    assert [row["depth"] for row in rows] == [None] * 3
    assert rows[0]["class_ids"] is not None


def test_an_empty_reading_is_no_parquet():
    with pytest.raises(ValueError, match="Parquet"):
        read_rows(b"nothing")


def test_png_tree(tmp_path, shard):
    store = open_store(str(tmp_path / "job"), create=True)
    newer = Generation(1)
    assert write_png_tree(store, encode_shard(shard, {}), anew=False, newer=newer) == 6
    folder = tmp_path / "job/png/drive/a.mp4"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{index:06d}{suffix}"
        for index in (0, 2)
        for suffix in ("_labelTrainIds.png", "_color.png", "_depth.png")
    )
    ids = cv2.imread(str(folder / "000002_labelTrainIds.png"), cv2.IMREAD_UNCHANGED)
    depth = cv2.imread(str(folder / "000002_depth.png"), cv2.IMREAD_UNCHANGED)
    color = cv2.imread(str(folder / "000002_color.png"), cv2.IMREAD_UNCHANGED)
    assert (ids.shape, ids.dtype) == ((64, 96), np.uint8)
    assert (depth.shape, depth.dtype) == ((64, 96), np.uint16)
    assert color.shape == (64, 96, 3)
    assert np.array_equal(ids, shard.class_ids[1])


def test_an_error_s_pngs_are_deleted_unless_a_newer_generation_is_planned(tmp_path, shard):
    store = open_store(str(tmp_path / "job"), create=True)
    stale = "png/drive/a.mp4/000001_color.png"
    store.put(stale, b"older")
    newer = Generation(2)
    store.put(newer.plan_key, b"{}")
    write_png_tree(store, encode_shard(shard, {}), anew=True, newer=newer)
    assert store.exists(stale)
    store.delete([newer.plan_key])
    write_png_tree(store, encode_shard(shard, {}), anew=True, newer=newer)
    assert not store.exists(stale)


def test_class_ids_are_never_mixed():
    class_ids = np.array([[0, 18], [18, 0]], np.uint8)
    assert set(np.unique(resize_class_ids(class_ids, (37, 41)))) == {0, 18}


def test_invalid_depth_does_not_bleed():
    codes = np.full((8, 8), 2560, np.uint16)
    codes[:, 4:] = 0
    resized = resize_depth_codes(codes, (32, 32))
    assert set(np.unique(resized)) == {0, 2560}
    assert resized.dtype == np.uint16


def test_parquet_bytes_are_a_file(shard):
    assert pq.ParquetFile(io.BytesIO(encode_shard(shard, {}))).metadata.num_rows == 3


def test_depth_at_the_assets_own_size():
    shard = annotated_shard()
    small, large = (
        read_rows(encode_shard(shard, {}, depth_at_asset_size=at_asset))
        for at_asset in (False, True)
    )
    for row, other in zip(small, large, strict=True):
        if row["status"] != "ok":
            continue
        codes = decode_depth(other["depth"]["bytes"])
        assert codes.shape == (row["height"], row["width"])
        grid = decode_depth(row["depth"]["bytes"])
        assert np.array_equal(codes, resize_depth_codes(grid, (row["width"], row["height"])))


def test_a_small_file_of_large_rows_is_refused():
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), ["x" * (8 << 20)])
    sink = pa.BufferOutputStream()
    limits = {"dictionary_pagesize_limit": 1 << 30, "write_statistics": False}
    pq.write_table(
        pa.table({"frame_id": value}), sink, compression="zstd", store_schema=False, **limits
    )
    data = sink.getvalue().to_pybytes()
    assert 300 < len(data) < 1000
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match="its rows unpack to more than"):
        parse_parquet(data)
    # The whole table would take 2.5 GB.
    assert pa.default_memory_pool().max_memory() < max(before, 1 << 30)


def test_rows_read_in_pieces_are_the_table(shard):
    data = encode_shard(shard, {"plan_id": "p"})
    many = pa.concat_tables([pq.read_table(pa.BufferReader(data))] * 50)
    sink = pa.BufferOutputStream()
    pq.write_table(many, sink, row_group_size=40)
    read = parse_parquet(sink.getvalue().to_pybytes())
    assert read.equals(many)
    assert read.schema.equals(many.schema, check_metadata=True)
    some = parse_parquet(sink.getvalue().to_pybytes(), ["status", "frame_id"])
    assert some.equals(many.select(some.schema.names))
    empty = pa.BufferOutputStream()
    pq.write_table(many.slice(0, 0), empty)
    assert parse_parquet(empty.getvalue().to_pybytes()).equals(many.slice(0, 0))
