"""What a job would do: its plan, and from a few frames of the archive its time and output size."""

import os
import time
from dataclasses import dataclass, replace

from jobs.claim import load_weights, make_record, sized_as
from jobs.cluster import Cluster
from jobs.plan import Plan
from jobs.planner import Planner
from jobs.progress import say
from jobs.resources import resources_for
from jobs.spec import JobSpec
from pipeline.decode import decode_shard
from pipeline.layout import Generation
from pipeline.records import ShardSpec, Slice
from pipeline.sinks.parquet import encode_shard
from pipeline.stages import AnnotateShard, StageContext
from pipeline.tables import AnnotatedShard, DecodedShard

_SAMPLE_FRAMES = 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a dry run foretells; rough, from a sample.

    Attributes:
        num_actors: Models at a time on the machine that ran the dry run.
        frames_per_s: All of them together.
        time_s: For all frames at that rate.
        output_bytes: Parquet for all frames.
    """

    num_actors: int
    frames_per_s: float
    time_s: float
    output_bytes: int


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What ``plan`` prints.

    Attributes:
        plan: The plan, with no parts written.
        estimate: None if no frame of the sample could be read.
    """

    plan: Plan
    estimate: Estimate | None

    def text(self) -> str:
        """A few lines for a person."""
        plan = self.plan
        lines = [
            f"plan    {plan.plan_id[:16]}",
            f"assets  {plan.num_images} images, {plan.num_videos} videos"
            f" ({plan.video_duration_s:.0f} s), {plan.size_bytes / 1e6:.1f} MB,"
            f" {plan.num_ignored} other files ignored",
            f"frames  {plan.num_frames}, {plan.num_known_errors} of them unreadable",
            f"shards  {plan.num_shards}",
        ]
        if self.estimate is not None:
            lines += [
                f"time    about {self.estimate.time_s:.0f} s with {self.estimate.num_actors} models"
                f" here ({self.estimate.frames_per_s:.2f} frames/s), start-up not counted",
                f"output  about {self.estimate.output_bytes / 1e6:.1f} MB of Parquet",
            ]
        return "\n".join(lines)


def dry_run(spec: JobSpec) -> DryRun:
    """Plan without writing, and sample.

    Raises:
        UserError: If the archive or the weights cannot be opened.
    """
    weights = load_weights(spec)
    # Refuses what is no weights file, as a run does.
    spec = sized_as(make_record(spec, weights), spec)
    planner = Planner(spec)
    sample: list[ShardSpec] = []
    for shard in planner.shards():
        if not sample and any(part.error_kind is None for part in shard.slices):
            sample.append(shard)
    plan = planner.plan()
    if sample:
        say("Annotating a sample, to foretell time and size.")
    return DryRun(plan=plan, estimate=estimate(spec, weights, plan, sample[0]) if sample else None)


def estimate(spec: JobSpec, weights: bytes, plan: Plan, shard: ShardSpec) -> Estimate | None:
    """Annotate a few frames of one shard here and scale by the planned pixels.

    Args:
        spec: The job.
        weights: Bytes of its weights file.
        plan: The whole plan.
        shard: A shard of it to sample from.

    Returns:
        None if the sample holds no readable frame.
    """
    decoded = decode_shard(_sample(shard), spec.input.storage.options(), spec.limits.limits())
    if decoded.pixels.shape[0] == 0:
        return None
    context = StageContext(
        job_url="",
        job_storage=spec.output.storage.options(),
        archive_storage=spec.input.storage.options(),
        generation=Generation().number,
        plan_id=plan.plan_id,
        lease=0,
        metadata={},
        limits=spec.limits.limits(),
        threads=spec.model.threads,
    )
    annotated, seconds = _timed(AnnotateShard(context, weights), decoded)
    at_asset_size = spec.output.depth_size == "asset"
    data = encode_shard(annotated, {}, depth_at_asset_size=at_asset_size)
    # Sizes differ over an archive: what grows with it is the number of pixels.
    scale = plan.num_pixels / (decoded.pixels.size / 3)
    here = Cluster(num_cpus=spec.ray.num_cpus or _num_cpus(), num_gpus=_num_gpus(), embedded=True)
    num_actors = resources_for(spec.ray, here, plan.num_shards).max_actors
    time_s = seconds * scale / num_actors
    return Estimate(
        num_actors=num_actors,
        frames_per_s=(plan.num_frames - plan.num_known_errors) / max(1e-9, time_s),
        time_s=time_s,
        output_bytes=int(len(data) * scale),
    )


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _timed(stage: AnnotateShard, decoded: DecodedShard) -> tuple[AnnotatedShard, float]:
    stage.annotate(decoded)
    started = time.perf_counter()
    annotated = stage.annotate(decoded)
    encode_shard(annotated, {})
    return annotated, time.perf_counter() - started


def _sample(shard: ShardSpec) -> ShardSpec:
    slices: list[Slice] = []
    left = _SAMPLE_FRAMES
    for part in shard.slices:
        if part.error_kind is None and left > 0:
            slices.append(
                replace(
                    part,
                    frame_index=part.frame_index[:left],
                    pts=part.pts[:left],
                    pts_s=part.pts_s[:left],
                )
            )
            left -= len(slices[-1].frame_index)
    return replace(shard, slices=tuple(slices))
