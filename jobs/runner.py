"""Run a job to its end, or to where it is stopped: claim, plan, annotate, finish; then resume.

Every step can be repeated: a driver that dies anywhere leaves what the next one goes on from.
"""

import contextlib
import hashlib
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jobs.cluster import check_cluster, connect
from jobs.digests import fixed_digests
from jobs.generations import History, Quarantined, read_plans
from jobs.lease import DriverState, Pulse, heartbeats, is_cancelled, mark_cancelled, take_lease
from jobs.manifest import Manifest
from jobs.plan import Plan, Planner, check_archive, make_plan, open_output, read_plan
from jobs.progress import Progress, say
from jobs.record import OUTPUT_VERSION, JobRecord, claim_output, read_job
from jobs.spec import JobSpec, RaySection
from jobs.stage_times import StageTimes, busy_line
from pipeline.errors import ConflictError, JobError, StorageError, UserError
from pipeline.layout import SHARDS_PER_RANGE, Generation, attempt_of, shard_of
from pipeline.records import CommitRecord, ShardReceipt, canonical_json
from pipeline.storage import StorageOptions, Store, open_store, read_file
from pipeline.urls import shown

if TYPE_CHECKING:
    from pipeline.graph import PendingPart
    from pipeline.stages import StageContext

Outcome = Literal["done", "quarantined", "interrupted"]
# By generation, ``(shard_id, key of the winning Parquet object)``.
MissingPngs = dict[int, list[tuple[int, str]]]

# Of the web; the largest SegFormer has 340 MB.
_MAX_WEIGHTS_BYTES = 4 << 30
# The line of a traceback that names what was raised, by anybody but Ray.
_RAISED = re.compile(r"(?!ray\.)[\w.]+(?:Error|Exception): (.+)")
_STALLED = (
    "No shard has come for five minutes. If shards are not that long, a node may be gone, or the"
    " cluster has no room for a model: `ray status` shows what is waited for. Ctrl-C stops and"
    " loses nothing."
)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        url: The job's URI.
        outcome: ``done``, ``quarantined`` (done, with inputs that could not be read) or
            ``interrupted`` (resumable).
        num_frames: Planned frames.
        num_ok: Frames annotated, over all runs of the job.
        num_quarantined: Frames with a typed error.
        num_shards: Shards of the plan.
        num_done: Shards decided.
        num_computed: Shards that this run decided.
        busy: Share of the time that each stage's processes were at work, the busiest first, which
            is the one that limits; empty if this run annotated nothing.
    """

    url: str
    outcome: Outcome
    num_frames: int
    num_ok: int
    num_quarantined: int
    num_shards: int
    num_done: int
    num_computed: int
    busy: dict[str, float]


@dataclass(frozen=True)
class OpenJob:
    """A job whose output is claimed and whose weights lie in it.

    Attributes:
        store: Its store.
        record: What it pins.
        spec: What was asked for.
        generation: The generation that is being made.
        planner: Makes what plans it; None plans the whole archive.
    """

    store: Store
    record: JobRecord
    spec: JobSpec
    generation: Generation
    planner: Callable[[], Planner] | None = None

    def plan(self) -> Plan:
        """The generation's plan, made if there is none."""
        plan = read_plan(self.store, self.generation)
        if plan is not None:
            return plan
        planner = self.planner() if self.planner is not None else Planner(self.spec)
        return make_plan(self.store, self.generation, planner)


def run_job(spec: JobSpec) -> RunResult:
    """Run a job, or go on with it if the output holds it unfinished.

    Raises:
        UserError: If the request cannot be carried out as it stands.
        JobError: If the run had to stop; it can be resumed.
        StorageError: Likewise, because of a store.
    """
    check_cluster()
    return drive(claim_job(spec))


def resume_job(
    url: str,
    storage: StorageOptions,
    *,
    ray: RaySection | None = None,
    lease: int | None = None,
) -> RunResult:
    """Go on with the job that lives at ``url``, with the settings that it was made with.

    Args:
        url: The job's URI.
        storage: How to reach it.
        ray: What to take of this machine or cluster instead.
        lease: A lease that was taken for this run already.
    """
    check_cluster()
    return drive(reopen_job(url, storage, ray), lease)


def claim_job(spec: JobSpec) -> OpenJob:
    """Check the archive, load the weights, and make the output this job's."""
    check_archive(spec)
    weights = load_weights(spec)
    record = make_record(spec, weights)
    store = open_output(spec)
    held = claim_output(store, record, single_driver=spec.output.single_driver)
    if store.head(held.weights_key) is None:
        store.put(held.weights_key, weights)
    else:
        _check_weights(store, held, spec)
    return OpenJob(store, held, spec, newest_generation(store))


def reopen_job(url: str, storage: StorageOptions, ray: RaySection | None = None) -> OpenJob:
    """Open a job by its URI alone.

    Raises:
        UserError: If there is no job.
        JobError: If its weights are gone or not those it was made with.
    """
    store = open_store(url, storage)
    record = read_job(store)
    if record.output_version != OUTPUT_VERSION:
        message = (
            f"{store.url} was begun by a version with other outputs (output_version "
            f"{record.output_version} there, {OUTPUT_VERSION} here); finish it with that version"
        )
        raise ConflictError(message)
    spec = record.job_spec()
    if ray is not None:
        spec = spec.model_copy(update={"ray": ray})
    _check_weights(store, record, spec)
    return OpenJob(store, record, spec, newest_generation(store))


def _check_weights(store: Store, record: JobRecord, spec: JobSpec) -> None:
    """See that the job holds its weights; a driver may have died before it left them there."""
    there = store.head(record.weights_key) is not None
    weights = store.read(record.weights_key) if there else load_weights(spec)
    if hashlib.sha256(weights).hexdigest() != record.weights_sha256:
        place = record.weights_key if there else spec.model.weights
        message = f"{store.url}: {place} is not the weights file that the job was made with"
        raise JobError(message)
    if not there:
        store.put(record.weights_key, weights)


def load_weights(spec: JobSpec) -> bytes:
    """Bytes of the weights file that the spec names, or of the one in the package.

    Raises:
        UserError: If the file cannot be read.
    """
    if spec.model.weights is None:
        from segformer3d.weights import bundled_weights

        return bundled_weights()
    url = spec.model.weights
    try:
        return read_file(url, spec.input.storage.options(), max_web_bytes=_MAX_WEIGHTS_BYTES)
    except (StorageError, UserError) as error:
        message = f"weights {shown(url)}: {error}"
        raise UserError(message) from None


def make_record(spec: JobSpec, weights: bytes) -> JobRecord:
    """What ``job.json`` will say.

    Raises:
        UserError: If the weights are not a file of this project.
    """
    from segformer3d.labels import CLASSES
    from segformer3d.weights import WeightsError, model_from_bytes

    try:
        _, info = model_from_bytes(weights)
    except WeightsError as error:
        message = f"weights {spec.model.weights}: {error}"
        raise UserError(message) from None
    if not info.trained:
        say("The weights are untrained: the outputs show that everything runs, not a street.")
    return JobRecord(
        spec=spec.recorded(),
        identity=spec.identity(),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        trained=info.trained,
        preprocessing=info.preprocessing.to_dict(),
        labels=[item.name for item in CLASSES],
        depth_codec=info.depth_codec.to_dict() if info.depth_codec else None,
        software_version=_version(),
    )


def drive(job: OpenJob, lease: int | None = None) -> RunResult:
    """Take a lease, unless one is given, and do whatever of the job is not done."""
    driver = _Driver(job, lease)
    with driver.signals(), Pulse(job.store, driver.lease, driver.progress):
        return driver.run()


class _Driver:
    """One driver's run of one generation."""

    def __init__(self, job: OpenJob, lease: int | None) -> None:
        self.job = job
        self.store, self.generation = job.store, job.generation
        self._warn_of_others()
        self.lease = lease or take_lease(job.store)
        self.state: DriverState = "planning"
        self.bar: Progress | None = None
        self.plan: Plan | None = None
        self.num_done = 0
        self.num_computed = 0
        self.times = StageTimes()
        self.busy: dict[str, float] = {}
        self._first_s = time.monotonic()
        self._interrupts = 0

    def run(self) -> RunResult:
        """Plan if need be, annotate what is pending, and finish if nothing is."""
        self.plan = plan = self.job.plan()
        # Sealing first: whatever is read of the records from now on is read once.
        manifest = self._manifest(plan).seal()
        self.num_done = manifest.num_done
        missing_pngs: MissingPngs = {}
        if manifest.is_complete:
            say("Every shard is decided already; files that came later need another output.")
            missing_pngs = self._missing_pngs()
        if (not manifest.is_complete or missing_pngs) and not self._stopping():
            manifest = self._compute(plan, manifest, missing_pngs)
        manifest.seal()
        return self._finish()

    def progress(self) -> dict[str, Any]:
        """Fields of this driver's next heartbeat."""
        return {
            "state": "draining" if self._interrupts else self.state,
            "num_done": self.num_done,
            "num_shards": self.plan.num_shards if self.plan else 0,
            "frames_per_s": round(self.bar.rate, 3) if self.bar else 0.0,
        }

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Drain on the first SIGINT or SIGTERM, stop at once on the second."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        self._listen()
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _listen(self) -> None:
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupts += 1
        # While planning there is nothing to drain.
        if self._interrupts > 1 or self.state == "planning":
            raise KeyboardInterrupt
        say("Stopping: the shards in the model are finished first; once more stops at once.")
        threading.Thread(target=mark_cancelled, args=(self.store, self.lease)).start()

    def _stopping(self) -> bool:
        return self._interrupts > 0 or is_cancelled(self.store, self.lease)

    def _warn_of_others(self) -> None:
        for other in heartbeats(self.store):
            if other.is_alive and other.state != "submitted":
                say(f"Another driver works on this job (process {other.pid} on {other.host}).")

    def _manifest(self, plan: Plan) -> Manifest:
        return Manifest.load(self.store, self.generation, plan.plan_id, plan.num_shards)

    def _compute(self, plan: Plan, manifest: Manifest, missing_pngs: MissingPngs) -> Manifest:
        from pipeline.graph import WeightsFile, choose_resources, run_graph, run_png_graph

        say("Starting Ray and the models; the first shard comes after about half a minute.")
        with connect(self.job.spec.ray) as cluster:
            # Ray takes the signals over when it starts.
            if threading.current_thread() is threading.main_thread():
                self._listen()
            self.state = "running"
            context = self._context(plan)
            parts = pending_parts(plan, manifest, backwards=self.lease % 2 == 0)
            if parts:
                wanted = self.job.spec.ray
                resources = choose_resources(
                    cluster.num_cpus, cluster.num_gpus, wanted.max_actors, wanted.max_io_tasks
                )
                record = self.job.record
                weights = WeightsFile(key=record.weights_key, sha256=record.weights_sha256)
                self._follow(run_graph(context, parts, weights, resources), plan, manifest)
                self.busy = self.times.busy(
                    time.monotonic() - self._first_s,
                    num_actors=resources.max_actors,
                    num_io_tasks=resources.max_io_tasks,
                )
                say(busy_line(self.busy))
                manifest = self._manifest(plan)
                self.num_done = manifest.num_done
                missing_pngs = self._missing_pngs()
            if missing_pngs and not self._stopping():
                num_missing = sum(map(len, missing_pngs.values()))
                say(f"Writing the PNGs of {num_missing} shards that were stopped before.")
                for number, keys in missing_pngs.items():
                    for _ in run_png_graph(replace(context, generation=number), keys):
                        pass
        return manifest

    def _follow(self, receipts: Iterator[ShardReceipt], plan: Plan, manifest: Manifest) -> None:
        done = sum(record.num_rows for record in manifest.records())
        num_bad = 0
        with Progress("annotating", plan.num_frames, done=done, if_stalled=_STALLED) as self.bar:
            for receipt in _guarded(receipts, self.store.url):
                if self.times.annotate_s == 0:
                    # Starting up is no stage's time; the first shard's own is.
                    own_s = receipt.decode_s + receipt.annotate_s + receipt.publish_s
                    self._first_s = time.monotonic() - own_s
                self.times.add(receipt)
                self.num_done += 1
                if self.num_done % SHARDS_PER_RANGE == 0:
                    self._manifest(plan).seal()
                self.num_computed += receipt.won
                num_bad += receipt.num_rows - receipt.num_ok
                notes = {"bad": num_bad} if num_bad else {}
                self.bar.advance(receipt.num_rows, **notes)

    def _context(self, plan: Plan) -> "StageContext":
        from pipeline.stages import StageContext
        from pipeline.storage.opening import resolve_options

        spec, record = self.job.spec, self.job.record
        return StageContext(
            job_url=self.store.url,
            job_storage=resolve_options(spec.output.storage.options()),
            archive_storage=resolve_options(spec.input.storage.options()),
            generation=self.generation.number,
            plan_id=plan.plan_id,
            lease=self.lease,
            metadata={
                "plan_id": plan.plan_id,
                "generation": self.generation.number,
                "weights_sha256": record.weights_sha256,
                "trained": record.trained,
                "preprocessing": record.preprocessing,
                "labels": record.labels,
                "depth_codec": record.depth_codec,
                "output_version": record.output_version,
                "identity": record.identity,
            },
            limits=spec.limits.limits(),
            write_png=spec.output.png,
            class_ids_at_asset_size=spec.output.class_ids_size == "asset",
            depth_at_asset_size=spec.output.depth_size == "asset",
            micro_batch=spec.model.micro_batch,
            threads=spec.model.threads,
        )

    def _missing_pngs(self, history: History | None = None) -> MissingPngs:
        """Those of older generations too: a repair leaves behind what of them is unfinished."""
        if not self.job.spec.output.png:
            return {}
        history = history or History.load(self.store)
        found: MissingPngs = {}
        for view in history.views[: self.generation.number + 1]:
            layout = view.generation
            marked = {shard_of(item.key) for item in self.store.list(layout.png_done_prefix)}
            keys = [
                (record.shard_id, f"{layout.prefix}{record.files[0].path}")
                for record in view.records
                if record.shard_id not in marked
            ]
            if keys:
                found[layout.number] = keys
        return found

    def _finish(self) -> RunResult:
        history = History.load(self.store)
        view = history.views[self.generation.number]
        result = RunResult(
            url=self.store.url,
            outcome="interrupted",
            num_frames=history.num_frames,
            num_ok=history.num_ok,
            num_quarantined=history.num_quarantined,
            num_shards=history.num_shards,
            num_done=history.num_done,
            num_computed=self.num_computed,
            busy={name: round(share, 4) for name, share in self.busy.items()},
        )
        collect_orphans(self.store, self.generation, view.plan, view.records)
        if not view.is_complete or self._missing_pngs(history):
            if self._stopping():
                return result
            message = (
                f"{self.store.url}: {view.num_shards - view.num_done} shards came back "
                "undecided; go on with `segformer3d resume`"
            )
            raise JobError(message)
        write_success(self.store, self.generation, view.plan, view.records)
        num_lost = sum(
            item.num_shards - item.num_done for item in history.views[: self.generation.number]
        )
        if num_lost:
            message = (
                f"{self.store.url}: {num_lost} shards of older generations have lost their commit "
                "records; do them anew with `segformer3d verify --repair`"
            )
            raise JobError(message)
        if not history.is_complete:
            # Somebody has planned a newer generation meanwhile.
            return result
        return replace(result, outcome="quarantined" if result.num_quarantined else "done")


def pending_parts(plan: Plan, manifest: Manifest, *, backwards: bool) -> "list[PendingPart]":
    """What is still to be done, by part of the plan.

    Args:
        plan: The plan.
        manifest: What is decided.
        backwards: Whether to start from the end, so that two drivers meet in the middle.
    """
    from pipeline.graph import PendingPart

    done = manifest.done()
    parts = []
    for part in plan.parts:
        ids = np.arange(part.first_shard, part.first_shard + part.num_shards)
        pending = ids[~done[ids]]
        if pending.size:
            order = pending[::-1] if backwards else pending
            parts.append(PendingPart(key=part.key, shard_ids=tuple(order.tolist())))
    return parts[::-1] if backwards else parts


def collect_orphans(
    store: Store, generation: Generation, plan: Plan, records: Sequence[CommitRecord]
) -> int:
    """Delete data of decided shards that lost, and plan parts that no plan names.

    An attempt of an undecided shard may still win: it is never touched.

    Returns:
        How many objects were deleted.
    """
    winners = {record.shard_id: record.attempt for record in records}
    named = {part.key for part in plan.parts}
    orphans = []
    for item in store.list(generation.data_prefix):
        attempt = attempt_of(item.key)
        if attempt and attempt[0] in winners and winners[attempt[0]] != attempt[1]:
            orphans.append(item.key)
    orphans += [
        item.key
        for item in store.list(generation.plan_key.rpartition("/")[0] + "/")
        if item.key.endswith(".parquet") and item.key not in named
    ]
    store.delete(orphans)
    return len(orphans)


def write_success(
    store: Store, generation: Generation, plan: Plan, records: Sequence[CommitRecord]
) -> None:
    """Say that the generation is complete; the same content whoever writes it."""
    from pipeline.storage import create_once

    summary = summarise(plan, records) | {"sha256": fixed_digests(store, generation, plan)}
    create_once(store, generation.success_key, canonical_json(summary))


def summarise(plan: Plan, records: Collection[CommitRecord]) -> dict[str, Any]:
    """What the success marker counts of a generation."""
    return {
        "plan_id": plan.plan_id,
        "num_shards": plan.num_shards,
        "num_rows": sum(record.num_rows for record in records),
        "num_ok": sum(record.num_ok for record in records),
        "quarantined": count_kinds(item for record in records for item in record.quarantined),
    }


def count_kinds(quarantined: Iterable[Quarantined]) -> dict[str, int]:
    """How many frames each kind of error took."""
    return dict(Counter(kind for _, _, kind, _ in quarantined))


def newest_generation(store: Store) -> Generation:
    """The last generation that is planned, or the first if none is."""
    return Generation(max(0, len(read_plans(store)) - 1))


def _guarded(receipts: Iterator[ShardReceipt], url: str) -> Iterator[ShardReceipt]:
    """Turn what Ray raises into one line; nothing committed is lost by it."""
    import ray.exceptions

    try:
        yield from receipts
    except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
        message = (
            f"the run stopped: {_reason(error)}; what is committed stays, "
            f"go on with `segformer3d resume {url}`"
        )
        raise JobError(message) from error


def _reason(error: BaseException) -> str:
    """What a task raised, out of the traceback that Ray gives as text around advice of its own."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    raised = [match[1] for line in lines if (match := _RAISED.match(line))]
    return (raised or lines or [type(error).__name__])[-1].strip()


def _version() -> str:
    from importlib.metadata import version

    return version("segformer3d")
