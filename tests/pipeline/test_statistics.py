"""Statistics of a frame, and that they come to rows from where they are made."""

import numpy as np
import pytest

from pipeline.records import Certainty, FrameRecord
from pipeline.sinks.parquet import encode_shard, read_rows
from pipeline.statistics import NUM_CLASSES, class_fraction, depth_percentiles
from pipeline.tables import AnnotatedShard
from segformer3d.config import METRIC_DEPTH, DepthCodec


@pytest.mark.parametrize("shape", [(64, 96), (31, 17), (1, 3), (0, 8)])
@pytest.mark.parametrize("side", [1, 16])
def test_shares_are_those_of_the_valid_pixels(shape: tuple[int, int], side: int) -> None:
    rng = np.random.default_rng(side)
    ids = rng.integers(0, 24, (64 // side + 1, 96 // side + 1), np.uint8).repeat(side, 0)
    ids = ids.repeat(side, 1)[: shape[0], : shape[1]]
    ids[ids >= NUM_CLASSES] = 255
    counts = np.bincount(ids.reshape(-1), minlength=256)[:NUM_CLASSES]
    expected = counts / max(1, counts.sum())
    assert class_fraction(ids) == pytest.approx(expected.tolist())


def test_percentiles_leave_out_what_is_invalid() -> None:
    codes = METRIC_DEPTH.encode(np.array([np.nan, 0.0, -1.0, np.inf, *range(1, 102)]))
    assert depth_percentiles(codes, METRIC_DEPTH.scale) == pytest.approx((6, 51, 96))
    assert depth_percentiles(codes[:4], METRIC_DEPTH.scale) == (None, None, None)
    drawn = np.random.default_rng(1).integers(0, 2**16, (31, 17), np.uint16)
    metres = METRIC_DEPTH.decode(drawn)
    expected = np.nanpercentile(metres, (5, 50, 95))
    assert depth_percentiles(drawn, METRIC_DEPTH.scale) == pytest.approx(expected)


def shard_of(codec: DepthCodec | None) -> AnnotatedShard:
    frames = tuple(
        FrameRecord(
            asset=f"{index}.jpg",
            frame_index=0,
            pts_s=None,
            width=8,
            height=8,
            error_kind="corrupt" if index == 1 else None,
        )
        for index in range(3)
    )
    ids = np.repeat(np.array([3, 5], np.uint8), 64).reshape(2, 8, 8)
    depth = np.repeat(np.array([512, 1024], np.uint16), 4).reshape(2, 2, 2)
    return AnnotatedShard(
        shard_id=0,
        frames=frames,
        class_ids=tuple(ids),
        depth=tuple(depth),
        certainty=(Certainty(confidence_mean=0.25), Certainty(confidence_mean=0.75)),
        depth_codec=codec.to_dict() if codec else None,
    )


def test_rows_have_them_of_their_own_frame() -> None:
    passed = AnnotatedShard.from_table(shard_of(METRIC_DEPTH).to_table())
    first, error, second = read_rows(encode_shard(passed, {}))
    assert error["class_fraction"] is None
    for row, place, metres, confidence in ((first, 3, 2.0, 0.25), (second, 5, 4.0, 0.75)):
        assert row["class_fraction"] == [float(index == place) for index in range(NUM_CLASSES)]
        assert row["depth_p50_m"] == pytest.approx(metres)
        assert row["confidence_mean"] == confidence


@pytest.mark.parametrize("kind", ["relative", None])
def test_depth_without_metres_has_no_percentiles(kind: str | None) -> None:
    codec = DepthCodec.from_dict(METRIC_DEPTH.to_dict() | {"kind": kind}) if kind else None
    row = read_rows(encode_shard(shard_of(codec), {}))[0]
    assert row["depth_p50_m"] is None
