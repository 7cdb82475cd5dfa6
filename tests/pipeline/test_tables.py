"""Records survive the trip through Arrow."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline import tables
from pipeline.records import Certainty, FrameRecord, ShardSpec, Slice
from pipeline.tables import (
    AnnotatedShard,
    DecodedShard,
    ShardReceipt,
    shards_from_table,
    shards_to_table,
)
from segformer3d.config import METRIC_DEPTH

FRAMES = (
    FrameRecord(asset="a.mp4", frame_index=0, pts_s=0.0, width=96, height=64),
    FrameRecord(
        asset="a.mp4",
        frame_index=1,
        pts_s=0.04,
        width=96,
        height=64,
        error_kind="corrupt",
        error="broken",
    ),
    FrameRecord(asset="b.jpg", frame_index=0, pts_s=None, width=96, height=64),
)


def through_ipc(table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


@pytest.mark.parametrize("count", [0, 2])
def test_decoded_shard_round_trip(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 96, 3), np.uint8)
    shard = DecodedShard(shard_id=7, frames=FRAMES, pixels=pixels, decode_s=0.5)
    back = DecodedShard.from_table(through_ipc(shard.to_table()))
    assert (back.shard_id, back.frames, back.decode_s) == (7, FRAMES, 0.5)
    assert np.array_equal(back.pixels, pixels)
    assert back.pixels.shape == pixels.shape


def test_decoded_pixels_are_a_view():
    pixels = np.ones((1, 32, 32, 3), np.uint8)
    table = DecodedShard(shard_id=0, frames=FRAMES[:1], pixels=pixels).to_table()
    view = DecodedShard.from_table(table).pixels
    assert not view.flags.owndata
    assert view.__array_interface__["data"][0] == pixels.__array_interface__["data"][0]


@pytest.mark.parametrize("lacking", ["none", "class_ids", "depth"])
def test_annotated_shard_round_trip(lacking):
    rng = np.random.default_rng(1)
    # Sizes differ where class ids are asked for at the asset's own size.
    class_ids = tuple(rng.integers(0, 19, size, np.uint8) for size in ((64, 96), (31, 17)))
    depth = tuple(rng.integers(0, 65536, (16, 24), np.uint16) for _ in range(2))
    shard = AnnotatedShard(
        shard_id=3,
        frames=FRAMES,
        class_ids=None if lacking == "class_ids" else class_ids,
        depth=None if lacking == "depth" else depth,
        certainty=(Certainty(confidence_mean=0.5), Certainty()),
        depth_codec=METRIC_DEPTH.to_dict(),
        annotate_s=2.0,
    )
    back = AnnotatedShard.from_table(through_ipc(shard.to_table()))
    assert (back.frames, back.certainty, back.annotate_s) == (FRAMES, shard.certainty, 2.0)
    assert back.depth_codec == shard.depth_codec
    for mine, theirs in ((shard.class_ids, back.class_ids), (shard.depth, back.depth)):
        assert (mine is None) == (theirs is None)
        assert all(np.array_equal(a, b) for a, b in zip(mine or (), theirs or (), strict=True))


def test_more_than_one_row_is_refused():
    table = DecodedShard(
        shard_id=0, frames=(), pixels=np.empty((0, 32, 32, 3), np.uint8)
    ).to_table()
    with pytest.raises(ValueError, match="one row"):
        DecodedShard.from_table(pa.concat_tables([table, table]))


def test_shards_round_trip():
    shard = ShardSpec(
        shard_id=1,
        root="/archive",
        input_width_px=96,
        input_height_px=64,
        slices=(
            Slice(
                asset="a.mp4",
                kind="video",
                size_bytes=10,
                etag="x",
                width=960,
                height=540,
                frame_index=(3, 4),
                pts=(300, 400),
                pts_s=(0.3, 0.4),
                seek_pts=200,
            ),
            Slice(asset="b.jpg", kind="image", size_bytes=1, etag="y", width=5, height=6),
        ),
    )
    assert shards_from_table(through_ipc(shards_to_table([shard]))) == [shard]
    assert shard.num_frames == 3


def test_receipts_round_trip():
    receipt = ShardReceipt(shard_id=1, won=True, num_rows=4, num_ok=3, size_bytes=9)
    assert ShardReceipt.all_from_table(receipt.to_table()) == [receipt]


def test_arrays_of_one_block_travel_without_a_copy() -> None:
    block = np.arange(48, dtype=np.uint8).reshape(4, 3, 4)
    whole = tables._flat(tuple(block))
    assert np.shares_memory(whole, block)
    np.testing.assert_array_equal(whole, block.reshape(-1))
    apart = [
        (block[0], block[2]),
        (block[1], block[0]),
        (block[0], block[1].copy()),
        tuple(block[:, :, ::2]),
    ]
    for arrays in apart:
        flat = tables._flat(arrays)
        assert not np.shares_memory(flat, block)
        np.testing.assert_array_equal(flat, np.concatenate([a.reshape(-1) for a in arrays]))
