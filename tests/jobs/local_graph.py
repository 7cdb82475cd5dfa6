"""A whole job in one process: the real driver and the real stages, a plain loop instead of Ray.

``python -m tests.jobs.local_graph run --output ...`` is the real command line over that loop. Only
the model is a stand-in: what it says of a frame follows from the frame's pixels, so that other
pixels, or pixels in another order, would show.
"""

import hashlib
import pickle
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import ray.exceptions

import pipeline.decode
from jobs.cluster import Cluster
from jobs.planner import Planner
from jobs.spec import JobSpec, RaySection
from pipeline import graph
from pipeline.actors import WeightsFile
from pipeline.graph import PendingPart, Resources
from pipeline.records import Asset, Certainty, ShardSpec
from pipeline.sources.assets import AssetProbe, DecodeLimits
from pipeline.stages import DecodeShard, PublishShard, StageContext
from pipeline.storage import StorageOptions
from pipeline.tables import AnnotatedShard, DecodedShard, ShardReceipt
from segformer3d.config import METRIC_DEPTH

SHARDS_PER_RANGE = 3


@dataclass
class Footage:
    """What the decoder says of an archive, remembered: a killed driver need not start another."""

    probes: dict[Asset, AssetProbe] = field(default_factory=dict)
    shards: dict[ShardSpec, DecodedShard] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: JobSpec) -> "Footage":
        """Probe and decode all of a job's archive for real."""
        footage = cls()
        with footage.used():
            for shard in Planner(spec).shards():
                footage.decode_shard(shard, StorageOptions(), spec.limits.limits())
        return footage

    @contextmanager
    def used(self) -> Iterator[None]:
        """Answer from memory where the planner and the stages would ask a decoding child."""
        with (
            patch("jobs.planner.probe_assets", self.probe_assets),
            patch("pipeline.stages.decode_shard", self.decode_shard),
        ):
            yield

    def probe_assets(
        self, root: str, assets: Sequence[Asset], storage: StorageOptions, limits: DecodeLimits
    ) -> list[AssetProbe]:
        unknown = [asset for asset in assets if asset not in self.probes]
        if unknown:
            probes = pipeline.decode.probe_assets(root, unknown, storage, limits)
            self.probes.update(zip(unknown, probes, strict=True))
        return [self.probes[asset] for asset in assets]

    def decode_shard(
        self,
        spec: ShardSpec,
        storage: StorageOptions,
        limits: DecodeLimits,
        tally: pipeline.decode.Tally | None = None,
    ) -> DecodedShard:
        if spec not in self.shards:
            self.shards[spec] = pipeline.decode.decode_shard(spec, storage, limits, tally)
        return self.shards[spec]

    def save(self, path: Path) -> Path:
        path.write_bytes(pickle.dumps(self))
        return path

    @classmethod
    def load(cls, path: Path) -> "Footage":
        footage = pickle.loads(path.read_bytes())  # noqa: S301 - our own
        assert isinstance(footage, cls)
        return footage


class AnnotateStandIn:
    """``actors.AnnotateActor`` without a network: it reads the weights and looks at them only."""

    def __init__(self, context: StageContext, weights: WeightsFile) -> None:
        data = context.store().read(weights.key)
        assert hashlib.sha256(data).hexdigest() == weights.sha256

    def __call__(self, table: pa.Table) -> pa.Table:
        return table if table.num_rows == 0 else _made_up(DecodedShard.from_table(table)).to_table()


def _made_up(shard: DecodedShard) -> AnnotatedShard:
    pixels = shard.pixels
    return AnnotatedShard(
        shard_id=shard.shard_id,
        frames=shard.frames,
        class_ids=tuple(np.ascontiguousarray(frame[:, :, 0] % 19) for frame in pixels),
        depth=tuple(frame[::4, ::4, 1].astype(np.uint16) * 257 for frame in pixels),
        certainty=(Certainty(confidence_mean=0.5, entropy_mean=1.0),) * len(pixels),
        depth_codec=METRIC_DEPTH.to_dict(),
    )


@contextmanager
def without_ray(
    *, shards_per_range: int = SHARDS_PER_RANGE, repeat_every: int = 0
) -> Iterator[None]:
    """Let the driver run its stages in a plain loop.

    Args:
        shards_per_range: So few that ranges are sealed while a small job runs.
        repeat_every: Publish each shard whose number divides by it twice, as Ray does when it
            loses what a task returned; 0 for none.
    """

    def run_graph(
        context: StageContext,
        parts: Sequence[PendingPart],
        weights: WeightsFile,
        _: Resources,
    ) -> Iterator[ShardReceipt]:
        with _raised_as_ray_does():
            yield from _receipts(context, parts, weights, repeat_every)

    with ExitStack() as stack:
        stack.enter_context(patch("jobs.runner.connect", _no_cluster))
        stack.enter_context(patch("pipeline.graph.run_graph", run_graph))
        stack.enter_context(patch("pipeline.graph.run_png_graph", _run_png_graph))
        stack.enter_context(small_ranges(shards_per_range))
        yield


@contextmanager
def small_ranges(shards_per_range: int = SHARDS_PER_RANGE) -> Iterator[None]:
    """Let a range hold few shards, for writers and readers alike."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(("jobs.", "pipeline.")) and hasattr(module, "SHARDS_PER_RANGE"):
                stack.enter_context(patch.object(module, "SHARDS_PER_RANGE", shards_per_range))
        yield


@contextmanager
def _no_cluster(_: RaySection) -> Iterator[Cluster]:
    yield Cluster(num_cpus=1, num_gpus=0, embedded=True)


def _receipts(
    context: StageContext, parts: Sequence[PendingPart], weights: WeightsFile, repeat_every: int
) -> Iterator[ShardReceipt]:
    read_plan = graph._ReadPlan(context)
    decode, publish = DecodeShard(context), PublishShard(context)
    annotate = AnnotateStandIn(context, weights)
    for part in parts:
        plan = read_plan(pa.Table.from_pylist([asdict(part)]))
        order = {shard_id: place for place, shard_id in enumerate(plan["shard_id"].to_pylist())}
        for shard_id in part.shard_ids:
            annotated = annotate(decode(plan.slice(order[shard_id], 1)))
            receipts = publish(annotated)
            if repeat_every and shard_id % repeat_every == 0:
                publish(annotated)
            yield from ShardReceipt.all_from_table(receipts)


def _run_png_graph(
    context: StageContext, data_keys: Sequence[tuple[int, str, str]]
) -> Iterator[ShardReceipt]:
    write = graph._WritePngs(context)
    with _raised_as_ray_does():
        for shard_id, key, sha256 in data_keys:
            receipts = write(pa.table({"shard_id": [shard_id], "key": [key], "sha256": [sha256]}))
            yield from ShardReceipt.all_from_table(receipts)


@contextmanager
def _raised_as_ray_does() -> Iterator[None]:
    """What a stage raises reaches the driver as text inside an exception of Ray's."""
    try:
        yield
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        raise ray.exceptions.RayTaskError("stage", text, error) from error


def main(arguments: Sequence[str]) -> int:
    """The command line over the plain loop."""
    import jobs.cli
    import jobs.runner
    import jobs.verify

    with without_ray():
        return jobs.cli.run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
