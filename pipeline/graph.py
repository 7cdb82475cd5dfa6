"""The whole system in one screen: plan -> decode -> annotate -> publish -> receipts, on Ray Data.

One Ray row in one block is one shard, from the plan to the receipt. Staged: CPU tasks decode and
publish, a pool of actors holds the model, and Ray Data's backpressure bounds what waits between.
Fused: each of these actors does all three, a few shards at a time, so nothing is copied between
processes, and Ray has a third of the tasks to manage.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from pipeline.actors import (
    IO_TASK_CPUS,
    AnnotateActor,
    GpuActor,
    WeightsFile,
    WholeActor,
)
from pipeline.errors import JobError
from pipeline.pinned import DamagedError, read_pinned
from pipeline.ray_data import configured
from pipeline.sinks.parquet import parse_parquet
from pipeline.stages import DecodeShard, PublishShard, StageContext, cached_store, make_pngs
from pipeline.storage import Store
from pipeline.tables import ShardReceipt

# A CPU actor asks for less than the core it keeps busy, so that decode and publish always have
# room: actors that take every core would starve their own feed.
_CPU_ACTOR_CPUS = 0.75
# Until a node that vanished is declared dead, for a minute or so, each second or two of trying to
# reach its actor costs a retry: with three, every lost node stopped the run. A frame that kills its
# process takes two, and a shard that waits for its turn one for each death before it. Who needs
# them all dies without having noted at what.
_MAX_SHARD_RETRIES = 100
# Of a task whose worker dies; Ray Data would try it for ever.
_TASK: dict[str, Any] = {"num_cpus": IO_TASK_CPUS, "max_retries": _MAX_SHARD_RETRIES}

GraphKind = Literal["staged", "fused"]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the graph may take of the cluster.

    Attributes:
        min_actors: Model actors to start with.
        max_actors: Model actors at the most.
        cpus_per_actor: CPUs that each asks Ray for.
        gpus_per_actor: GPUs that each asks Ray for.
        max_io_tasks: Decode tasks at a time, and publish tasks at a time; fused, shards at a time
            that are decoded or published.
        graph: How the stages are wired.
        early_workers: Workers for such tasks that each actor has Ray start before anything else.
    """

    min_actors: int
    max_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    max_io_tasks: int
    graph: GraphKind = "staged"
    early_workers: int = 0

    @property
    def feeds_gpus(self) -> bool:
        """Whether workers of their own decode and publish for GPUs."""
        return self.graph == "staged" and self.gpus_per_actor > 0


@dataclass(frozen=True, kw_only=True)
class PendingPart:
    """The shards of one part of a plan that are still to be done.

    Attributes:
        key: Key of the part within the job.
        sha256: What the plan pins; None if it does not.
        shard_ids: Which of its shards.
    """

    key: str
    sha256: str | None
    shard_ids: tuple[int, ...]


def choose_graph(num_gpus: float, *, one_machine: bool) -> GraphKind:
    """Fused, unless a GPU wants more decoders than its own process has, or nodes may be lost.

    Args:
        num_gpus: GPUs of the cluster.
        one_machine: Whether that is this machine only.
    """
    return "fused" if one_machine and num_gpus < 1 else "staged"


def choose_resources(
    num_cpus: float,
    num_gpus: float,
    max_actors: int | None = None,
    max_io_tasks: int | None = None,
    graph: GraphKind = "staged",
) -> Resources:
    """One actor per GPU; without GPUs, one per core.

    Args:
        num_cpus: CPUs of the cluster.
        num_gpus: GPUs of the cluster.
        max_actors: The user's own bound.
        max_io_tasks: The user's own number of decode tasks, and of publish tasks, at a time.
        graph: How the stages are wired.
    """
    num_actors = max(1, int(num_gpus) or int(num_cpus))
    num_actors = min(num_actors, max_actors or num_actors)
    # Both kinds of tasks, and the one that reads the plan, must fit beside the actors.
    beside = num_cpus - num_actors * _CPU_ACTOR_CPUS
    room = max(1, int((beside / IO_TASK_CPUS - 1) / 2))
    if graph == "fused":
        room = num_actors * WholeActor.SHARDS_AT_A_TIME
    return Resources(
        min_actors=num_actors,
        max_actors=num_actors,
        cpus_per_actor=_CPU_ACTOR_CPUS,
        gpus_per_actor=1.0 if num_gpus >= 1 else 0.0,
        max_io_tasks=min(max_io_tasks or max(2, int(num_cpus)), room),
        graph=graph,
    )


def build_graph(
    context: StageContext,
    parts: Sequence[PendingPart],
    weights: WeightsFile,
    resources: Resources,
) -> "ray.data.Dataset":
    """Wire the stages; nothing runs until the result is read.

    Args:
        context: The run.
        parts: What is still to be done.
        weights: The model.
        resources: What to take of the cluster.

    Returns:
        A dataset of receipts.
    """
    plan = ray.data.from_items(
        [asdict(part) for part in parts],
        override_num_blocks=len(parts),
    ).map_batches(
        _ReadPlan(context),
        batch_size=1,
        batch_format="pyarrow",
        concurrency=1,
        **_TASK,
    )
    if resources.graph == "fused":
        return _in_actors(plan, WholeActor, context, weights, resources)
    decoded = plan.map_batches(
        DecodeShard(context),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        concurrency=resources.max_io_tasks,
        **_TASK,
    )
    actor = GpuActor if resources.gpus_per_actor else AnnotateActor
    return _in_actors(decoded, actor, context, weights, resources).map_batches(
        PublishShard(context),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        concurrency=resources.max_io_tasks,
        **_TASK,
    )


def _in_actors(
    shards: "ray.data.Dataset",
    actor: type[AnnotateActor | GpuActor | WholeActor],
    context: StageContext,
    weights: WeightsFile,
    resources: Resources,
) -> "ray.data.Dataset":
    at_a_time = actor.SHARDS_AT_A_TIME
    arguments: tuple[object, ...] = (context, weights)
    if actor is GpuActor:
        arguments += (resources.early_workers,)
    return shards.map_batches(
        actor,
        fn_constructor_args=arguments,
        # One block is one shard anyway; with None, Ray refuses to give actors a GPU.
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=resources.cpus_per_actor,
        num_gpus=resources.gpus_per_actor,
        ray_remote_args_fn=_retry_rules,
        compute=ray.data.ActorPoolStrategy(
            min_size=resources.min_actors,
            max_size=resources.max_actors,
            max_tasks_in_flight_per_actor=actor.SHARDS_IN_FLIGHT,
            max_concurrent_calls_per_actor=at_a_time,
            enable_true_multi_threading=at_a_time > 1,
        ),
    )


def run_graph(
    context: StageContext,
    parts: Sequence[PendingPart],
    weights: WeightsFile,
    resources: Resources,
) -> Iterator[ShardReceipt]:
    """Do what is still to be done; yields a receipt as each shard is decided.

    Args:
        context: The run.
        parts: What is still to be done; at least one part.
        weights: The model.
        resources: What to take of the cluster.
    """
    with configured(for_gpus=resources.gpus_per_actor > 0):
        with warnings.catch_warnings():
            # The only way that Ray 2.60 has to bound an actor's retries is announced to go in 2.64.
            warnings.simplefilter("ignore", DeprecationWarning)
            dataset = build_graph(context, parts, weights, resources)
        yield from _receipts(dataset)


def run_png_graph(
    context: StageContext, data: Sequence[tuple[int, str, str]]
) -> Iterator[ShardReceipt]:
    """Write the PNGs of shards that were committed without them.

    Args:
        context: The run.
        data: ``(shard_id, key of the winning Parquet object, its sha256)``; at least one.
    """
    with configured(for_gpus=False):
        items = [dict(zip(("shard_id", "key", "sha256"), item, strict=True)) for item in data]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _WritePngs(context), batch_size=1, batch_format="pyarrow", **_TASK
        )
        yield from _receipts(dataset)


def _retry_rules() -> dict[str, int]:
    """Bound what Ray would try for ever; `pipeline.deaths` ends it long before."""
    return {"max_task_retries": _MAX_SHARD_RETRIES}


def _read_committed(store: Store, key: str, sha256: str | None) -> bytes:
    """As ``read_pinned``, with what to do about it."""
    try:
        return read_pinned(store, key, sha256)
    except DamagedError as error:
        message = f"{error}; see `segformer3d verify`"
        raise JobError(message) from error


class _ReadPlan:
    """A part's key and pending shard ids to rows of ``PLAN_SCHEMA``."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def __call__(self, table: pa.Table) -> pa.Table:
        (item,) = table.to_pylist()
        key = item["key"]
        data = _read_committed(self.context.store(), key, item["sha256"])
        try:
            plan = parse_parquet(data)
        except ValueError as error:
            message = f"{key}: cannot be read: {error}; see `segformer3d verify`"
            raise JobError(message) from error
        return plan.filter(pc.is_in(plan["shard_id"], pa.array(item["shard_ids"], pa.int64())))


class _WritePngs:
    """Shard ids, data keys and digests to receipts, after the PNGs are written."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def __call__(self, table: pa.Table) -> pa.Table:
        (item,) = table.to_pylist()
        store = cached_store(self.context.job_url, self.context.job_storage)
        data = _read_committed(store, item["key"], item["sha256"])
        make_pngs(store, self.context.layout, item["shard_id"], data)
        receipt = ShardReceipt(
            shard_id=item["shard_id"], won=False, num_rows=0, num_ok=0, size_bytes=len(data)
        )
        return receipt.to_table()


def _receipts(dataset: "ray.data.Dataset") -> Iterator[ShardReceipt]:
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from ShardReceipt.all_from_table(table)
