"""Shards made by hand, for tests of the model's stage and of what comes after it."""

from collections.abc import Collection, Sequence

import numpy as np

from pipeline.decode import DecodeLimits
from pipeline.records import Certainty, FrameRecord
from pipeline.stages import StageContext
from pipeline.storage import StorageOptions, Store
from pipeline.tables import AnnotatedShard, DecodedShard
from segformer3d.config import METRIC_DEPTH

SIZE = (96, 64)


def stage_context(store: Store, lease: int) -> StageContext:
    """A run of a job that has nothing but its store."""
    return StageContext(
        job_url=store.url,
        job_storage=StorageOptions(),
        archive_storage=StorageOptions(),
        generation=0,
        plan_id="plan",
        lease=lease,
        metadata={},
        limits=DecodeLimits(),
    )


def grey_shard(values: Sequence[int], bad: Collection[int] = ()) -> DecodedShard:
    """A frame of one grey value each, but for those that were not decoded."""
    frames = tuple(
        FrameRecord(
            asset=f"{place}.jpg",
            frame_index=0,
            pts_s=None,
            width=SIZE[0],
            height=SIZE[1],
            error_kind="corrupt" if place in bad else None,
            error="bad" if place in bad else None,
        )
        for place in range(len(values))
    )
    good = [value for place, value in enumerate(values) if place not in bad]
    width, height = SIZE
    pixels = np.repeat(np.array(good, np.uint8), height * width * 3)
    return DecodedShard(shard_id=7, frames=frames, pixels=pixels.reshape(-1, height, width, 3))


def annotated_shard(
    shard_id: int = 0, *, num_frames: int = 3, bad: int | None = 1, asset: str = "drive/a.mp4"
) -> AnnotatedShard:
    """A shard of one video whose frame ``bad`` could not be read."""
    rng = np.random.default_rng(shard_id)
    frames = tuple(
        FrameRecord(
            asset=asset,
            frame_index=index,
            pts_s=index / 25,
            width=SIZE[0],
            height=SIZE[1],
            error_kind="corrupt" if index == bad else None,
            error="cannot be decoded" if index == bad else None,
        )
        for index in range(num_frames)
    )
    good = sum(frame.error_kind is None for frame in frames)
    return AnnotatedShard(
        shard_id=shard_id,
        frames=frames,
        class_ids=tuple(rng.integers(0, 19, (64, 96), np.uint8) for _ in range(good)),
        depth=tuple(rng.integers(0, 65536, (16, 24), np.uint16) for _ in range(good)),
        certainty=(Certainty(confidence_mean=0.5, entropy_mean=1.0),) * good,
        depth_codec=METRIC_DEPTH.to_dict(),
    )
