"""A job without Ray: planned for real, published for real, annotated with made-up class ids."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jobs.claim import make_record
from jobs.finish import write_success
from jobs.generations import read_part
from jobs.manifest import Manifest
from jobs.plan import Plan
from jobs.planner import Planner, make_plan, open_output
from jobs.record import JobRecord, claim_output
from jobs.spec import JobSpec, check_spec
from pipeline.decode import DecodeLimits
from pipeline.layout import Generation
from pipeline.records import FrameRecord, ShardSpec
from pipeline.stages import PublishShard, StageContext
from pipeline.storage import StorageOptions, Store
from pipeline.tables import AnnotatedShard, ShardReceipt
from segformer3d.weights import untrained_weights
from tests.media import encode_cv2, picture
from tests.shards import annotated_shard

TINY = "mit:16,32,80,128:1,2,2,1"


@dataclass(frozen=True)
class Job:
    """A planned job that is published shard by shard."""

    spec: JobSpec
    store: Store
    record: JobRecord
    plan: Plan
    shards: list[ShardSpec]

    def context(self) -> StageContext:
        return StageContext(
            job_url=self.store.url,
            job_storage=StorageOptions(),
            archive_storage=StorageOptions(),
            generation=0,
            plan_id=self.plan.plan_id,
            lease=1,
            metadata={},
            limits=DecodeLimits(),
            write_png=self.spec.output.png,
        )

    def publish(self, shard_ids: Iterable[int]) -> list[ShardReceipt]:
        stage = PublishShard(self.context())
        return [stage.publish(self.annotated(self.shards[shard_id])) for shard_id in shard_ids]

    def annotated(self, shard: ShardSpec) -> AnnotatedShard:
        """What the model could have made of a shard."""
        frames = tuple(
            FrameRecord(
                asset=part.asset,
                frame_index=index,
                pts_s=part.pts_s[place] if part.pts_s else None,
                width=part.width,
                height=part.height,
                error_kind=part.error_kind,
                error=part.error,
            )
            for part in shard.slices
            for place, index in enumerate(part.frame_index)
        )
        good = sum(frame.error_kind is None for frame in frames)
        made_up = annotated_shard(shard.shard_id, num_frames=good, bad=None)
        return AnnotatedShard(
            shard_id=shard.shard_id,
            frames=frames,
            class_ids=made_up.class_ids,
            depth=made_up.depth,
            certainty=made_up.certainty,
            depth_codec=made_up.depth_codec,
        )


@functools.cache
def tiny_weights() -> bytes:
    """The smallest network that has all parts, made once."""
    return untrained_weights(TINY)


def make_job(
    folder: Path,
    *,
    url: str | None = None,
    num_images: int = 10,
    frames: int = 2,
    bad: bool = True,
) -> Job:
    """An archive of small JPEGs, one of them broken, claimed and planned.

    Args:
        folder: Where the archive is, and the job unless told.
        url: Where the job is.
        num_images: How many good ones.
        frames: Of a shard.
        bad: Whether one is broken.
    """
    archive = folder / "archive"
    archive.mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        data = encode_cv2(picture(seed=index), ".jpg")
        (archive / f"{index:04d}.jpg").write_bytes(data)
    if bad:
        (archive / "broken.jpg").write_bytes(b"no image at all")
    spec = check_spec(
        {
            "input": {"url": str(archive)},
            "output": {"url": url or str(folder / "job"), "png": True},
            "geometry": {"short_side_px": 64},
            "shard": {"frames": frames},
        },
        "the job",
    )
    return plan_job(spec)


def where(url: str) -> str:
    """Where a job lies, for people."""
    return "on S3" if "://" in url else "on a folder"


def plan_job(spec: JobSpec) -> Job:
    """A job of that spec, claimed and planned, wherever its output is."""
    store = open_output(spec)
    weights = tiny_weights()
    record = claim_output(store, make_record(spec, weights), single_driver=False)
    store.put(record.weights_key, weights)
    plan = make_plan(store, Generation(), Planner(spec))
    shards = [shard for part in plan.parts for shard in read_part(store, part)]
    return Job(spec=spec, store=store, record=record, plan=plan, shards=shards)


def finish_job(job: Job) -> None:
    """Seal and say that it is complete, as a driver does in the end."""
    generation, plan = Generation(), job.plan
    manifest = Manifest.load(job.store, generation, plan.plan_id, plan.num_shards).seal()
    write_success(job.store, generation, plan, list(manifest.records()))
