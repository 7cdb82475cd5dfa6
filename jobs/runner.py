"""Run a job to its end, or to where it is stopped: plan, annotate, finish; then resume.

Every step can be repeated: a driver that dies anywhere leaves what the next one goes on from.
"""

import contextlib
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jobs.claim import OpenJob, claim_job, reopen_job
from jobs.cluster import check_cluster, connect
from jobs.finish import collect_orphans, write_success
from jobs.generations import History
from jobs.lease import (
    HEARTBEAT_S,
    DriverState,
    Pulse,
    heartbeats,
    is_cancelled,
    mark_cancelled,
    take_lease,
)
from jobs.manifest import Manifest
from jobs.plan import Plan
from jobs.progress import Progress, say
from jobs.spec import JobSpec, RaySection
from jobs.stage_times import StageTimes, busy_line
from pipeline.errors import JobError, StorageError
from pipeline.layout import SHARDS_PER_RANGE, shard_of
from pipeline.storage import StorageOptions
from pipeline.tables import ShardReceipt

if TYPE_CHECKING:
    from pipeline.graph import PendingPart
    from pipeline.stages import StageContext

Outcome = Literal["done", "quarantined", "interrupted"]
# By generation, ``(shard_id, key of the winning Parquet object)``.
MissingPngs = dict[int, list[tuple[int, str, str]]]

# The line of a traceback that names what was raised, by anybody but Ray.
_RAISED = re.compile(r"(?!ray\.)[\w.]+(?:Error|Exception): (.+)")
_MAX_REASON_CHARS = 1000
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
        self._is_over = threading.Event()

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
            self._is_over.set()
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
        # Says how to go on now: a signal to the whole group ends Ray, which may take this along.
        say(
            "Stopping: the shards in the model are finished first; once more stops at once. "
            "Go on with `segformer3d resume`."
        )
        threading.Thread(target=self._ask_to_drain, name="cancel", daemon=True).start()

    def _ask_to_drain(self) -> None:
        """Tell the stages, however long the store takes to hear of it."""
        is_said = False
        while not self._is_over.is_set():
            try:
                mark_cancelled(self.store, self.lease)
            except StorageError as error:
                if not is_said:
                    say(f"The stages do not know yet that they are to stop: {error}; trying on.")
                is_said = True
                self._is_over.wait(HEARTBEAT_S)
            else:
                return

    def _stopping(self) -> bool:
        return self._interrupts > 0 or is_cancelled(self.store, self.lease)

    def _warn_of_others(self) -> None:
        for other in heartbeats(self.store):
            if other.is_alive and other.state != "submitted":
                say(f"Another driver works on this job (process {other.pid} on {other.host}).")

    def _manifest(self, plan: Plan) -> Manifest:
        return Manifest.load(self.store, self.generation, plan.plan_id, plan.num_shards)

    def _compute(self, plan: Plan, manifest: Manifest, missing_pngs: MissingPngs) -> Manifest:
        from jobs.resources import resources_for
        from pipeline.actors import WeightsFile
        from pipeline.graph import run_graph, run_png_graph

        say("Starting Ray and the models; the first shard comes after about half a minute.")
        with connect(self.job.spec.ray) as cluster:
            # Ray takes the signals over when it starts.
            if threading.current_thread() is threading.main_thread():
                self._listen()
            self.state = "running"
            context = self._context(plan)
            parts = pending_parts(plan, manifest, backwards=self.lease % 2 == 0)
            if parts:
                num_pending = sum(len(part.shard_ids) for part in parts)
                resources = resources_for(self.job.spec.ray, cluster, num_pending)
                record = self.job.record
                weights = WeightsFile(key=record.weights_key, sha256=record.weights_sha256)
                self._follow(run_graph(context, parts, weights, resources), plan, manifest)
                self.busy = self.times.busy(
                    time.monotonic() - self._first_s,
                    num_actors=resources.max_actors,
                    num_io_tasks=resources.max_io_tasks,
                )
                if self.num_computed:
                    say(busy_line(self.busy))
                manifest = self._manifest(plan)
                self.num_done = manifest.num_done
                missing_pngs = self._missing_pngs()
            if missing_pngs and not self._stopping():
                num_missing = sum(map(len, missing_pngs.values()))
                say(f"Writing the PNGs of {num_missing} shards that were stopped before.")
                for number, keys in missing_pngs.items():
                    made = run_png_graph(replace(context, generation=number), keys)
                    for _ in _guarded(made, self.store.url):
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
            job_storage=self.store.options,
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
                (record.shard_id, f"{layout.prefix}{file.path}", file.sha256)
                for record in view.records
                for file in record.files
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
        for item in history.views:
            # Losers of older generations too: a driver may have died before it deleted its own.
            collect_orphans(self.store, item.generation, item.plan, item.records)
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
            pending_ids = tuple(order.tolist())
            parts.append(PendingPart(key=part.key, sha256=part.sha256, shard_ids=pending_ids))
    return parts[::-1] if backwards else parts


def _guarded(receipts: Iterator[ShardReceipt], url: str) -> Iterator[ShardReceipt]:
    """Turn what Ray raises into one line; nothing committed is lost by it."""
    import ray.exceptions

    try:
        yield from receipts
    except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
        message = (
            f"the run stopped: {_reason(error)}; what is committed stays, "
            f"go on with `segformer3d resume {shlex.quote(url)}`"
        )
        raise JobError(message) from error


def _reason(error: BaseException) -> str:
    """What a task raised, out of the traceback that Ray gives as text around advice of its own."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    raised = [match[1] for line in lines if (match := _RAISED.match(line))]
    return (raised or lines or [type(error).__name__])[-1].strip()[:_MAX_REASON_CHARS]
