"""One job in a simulated world: real drivers over the simulated store, and the rules they keep.

Real are ``runner.drive`` with all that it calls (lease, heartbeats, plan, manifest, compaction,
collection, success marker), ``DecodeShard``'s looks at storage, ``PublishShard`` and the commit.
Replaced are the model and Ray (``_run_graph`` does what they do to the store: tasks in the driver's
or in workers' processes, repeated when a worker dies or falls silent), the listing of an archive,
the encoding of pixels, and mostly Parquet's encoding of snapshots, by Arrow's own.
"""

import contextlib
import datetime
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import claim, lease, manifest, planner, runner
from jobs.claim import OpenJob, newest_generation
from jobs.cluster import Cluster
from jobs.generations import GenerationView, History
from jobs.plan import Plan, PlanPart
from jobs.record import JobRecord
from jobs.runner import RunResult
from jobs.spec import check_spec
from pipeline import commit, graph, layout, stages
from pipeline.errors import JobError, Segformer3dError, StorageError
from pipeline.layout import (
    JOB_KEY,
    LEASE_PREFIX,
    MANIFEST_PREFIX,
    PNG_PREFIX,
    Generation,
    attempt_of,
    cancel_key,
)
from pipeline.pinned import DamagedError
from pipeline.records import CommitRecord, FrameRecord, ShardSpec, canonical_json
from pipeline.sinks.parquet import parse_parquet
from pipeline.storage import Store
from pipeline.tables import AnnotatedShard, ShardReceipt
from tests.simulation.world import Client, Process, World
from tests.virtual_store import Request

GENERATION = Generation()
PLAN_ID = "plan"
LEASE_KEY = f"{LEASE_PREFIX}lease-"
PLAN_FOLDER = GENERATION.plan_key.rpartition("/")[0] + "/"
# Objects that are created once and then never change.
FIXED = (GENERATION.commit_prefix, GENERATION.plan_key, GENERATION.success_key, LEASE_KEY)
_SILENT_WORKER_S = 60.0
_MOST_WORKERS = 8
_EPOCH = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_RECORD = JobRecord(
    spec={},
    identity={},
    weights_sha256="0" * 64,
    trained=True,
    preprocessing={},
    labels=[],
    depth_codec=None,
)
_SPECS = [
    check_spec(
        {"input": {"url": "/archive"}, "output": {"url": "/job", "png": png}}, "the simulation"
    )
    for png in (False, True)
]


@dataclass(frozen=True)
class Outcome:
    """What became of one seed.

    Attributes:
        seed: Which.
        broken: The rule that was broken, if any.
        schedule: All that happened, a line each; only if a rule was broken or it was asked for.
        counts: How often each thing happened.
    """

    seed: int
    broken: str | None
    schedule: str
    counts: dict[str, int]


def simulate(seed: int, *, keep_schedule: bool = False) -> Outcome:
    """Run one seed; to be called within ``simulation()``."""
    job = SimulatedJob(seed)
    job.run()
    world = job.world
    schedule = f"{job}\n{world.schedule()}" if keep_schedule or world.broken else ""
    return Outcome(seed, world.broken, schedule, dict(world.counts))


class SimulatedJob:
    """A world with drivers and others at one job, and what they must keep to.

    Args:
        seed: Decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.world = world = World(seed)
        world.watch = self
        rng = world.rng
        self.num_drivers = 16 if rng.random() < 0.005 else rng.choice((2, 2, 2, 3, 4))
        self.num_shards = rng.choice((1, 1, 2, 2, 3, 4, 6))
        self.shards_per_range = rng.choice((1, 2, 3, 1000))
        self.has_pngs = rng.random() < 0.2
        self.num_workers = rng.choice((0, 0, 2))
        self.uses_parquet = rng.random() < 0.02
        self.heartbeat_s = rng.choice((15.0, 300.0))
        self.shard_s = rng.choice((0.1, 3.0, 30.0))
        self.records: dict[int, CommitRecord] = {}
        self._written_at: dict[str, float] = {}
        self._collected_at: dict[Client, float] = {}
        self._parts: set[str] = set()
        self._markers: set[bytes] = set()
        self._leases: dict[int, Client] = {}
        self._num_attempts = 0
        self._rules: dict[str, Callable[[str, bytes | None], str | None]] = {
            _folder(GENERATION.commit_prefix): self._committed,
            _folder(GENERATION.data_prefix): self._data_changed,
            _folder(PLAN_FOLDER): self._plan_changed,
            _folder(MANIFEST_PREFIX): self._sealed,
            _folder(PNG_PREFIX): self._drawn,
            _folder(GENERATION.success_key): self._succeeded,
        }

    def run(self) -> None:
        """A disturbed time, a calm one in which somebody resumes, and a last look at the end."""
        global _job  # noqa: PLW0603 - the patched modules ask whose turn it is
        _job = self
        world, rng = self.world, self.world.rng
        _set_shards_per_range(self.shards_per_range)
        stages._drain_seen.clear()
        lease.HEARTBEAT_S = self.heartbeat_s
        world.objects[JOB_KEY] = b"{}"
        spread_s = rng.choice((0.0, 3.0, 100.0))
        for number in range(self.num_drivers):
            self._start(f"driver {number + 1}", self.drive, rng.random() * spread_s)
        if rng.random() < 0.3:
            self._start("canceller", self.cancel, 10 ** rng.uniform(-0.5, 2))
        if rng.random() < 0.2:
            self._start("reader", self.read, 10 ** rng.uniform(-0.5, 2.5))
        fresh = world.process("fresh", disturbed=False)
        world.spawn(fresh, "fresh", self.resume, 10 ** rng.uniform(1, 3))
        world.run()
        if world.broken is None and set(self._orphans()):
            # What zombies and late packets wrote after the end is the next resume's to remove.
            last = world.process("last", disturbed=False)
            world.spawn(last, "last", self.resume)
            world.run()
        if world.broken is None:
            self._check_rest()
        self._count()

    def __str__(self) -> str:
        kept = "num_drivers", "num_workers", "num_shards", "shards_per_range", "has_pngs"
        return ", ".join(f"{name} {getattr(self, name)}" for name in kept)

    # Who is there.

    def drive(self) -> None:
        """A driver, whatever befalls it."""
        with contextlib.suppress(Segformer3dError):
            self._drive()

    def resume(self) -> None:
        """An undisturbed driver; only who is asked to stop may stop."""
        self.world.is_calm = True
        for _ in range(3):
            try:
                result = self._drive()
            except Segformer3dError as error:
                self.world.fail(f"an undisturbed resume ends well ({error})")
                return
            if result.outcome != "interrupted":
                return
            self.world.counts["resumes that were cancelled"] += 1
        self.world.fail("an undisturbed resume ends well (cancelled again and again)")

    def cancel(self) -> None:
        """Somebody who asks all drivers to stop."""
        with contextlib.suppress(StorageError):
            self.world.counts["cancels"] += len(lease.request_cancel(self.world.store))

    def read(self) -> None:
        """Somebody who reads what is decided."""
        with contextlib.suppress(StorageError):
            view = manifest.Manifest.load(self.world.store, GENERATION, PLAN_ID, self.num_shards)
            records = list(view.records())
            if records != [self.records.get(record.shard_id) for record in records]:
                self.world.fail("a reader sees the records")
            if len(records) != view.num_done:
                self.world.fail("a reader sees every record once")

    def _stop(self, number: int) -> None:
        with contextlib.suppress(StorageError):
            lease.mark_cancelled(self.world.store, number)

    def _start(self, name: str, program: Callable[[], None], delay_s: float) -> None:
        process = self.world.process(name)
        self.world.spawn(process, name, program, delay_s)

    def _drive(self) -> RunResult:
        me = self.world.me
        store = self.world.store
        generation = newest_generation(store)
        job = OpenJob(store, _RECORD, _SPECS[self.has_pngs], generation)
        result = runner.drive(job)
        self._check_result(me, result)
        return result

    # What Ray and the model do.

    def annotate(
        self, context: stages.StageContext, parts: Sequence[graph.PendingPart]
    ) -> Iterator[ShardReceipt]:
        """Every pending shard, in this process or in workers', which may die without us."""
        todo = deque(shard_id for part in parts for shard_id in part.shard_ids)
        if self.num_workers:
            yield from _Workers(self, context, todo).receipts()
            return
        while todo:
            try:
                receipt = self.do_shard(context, todo.popleft())
            except StorageError as error:
                raise JobError(str(error)) from error  # as a failing task of Ray's comes back
            if receipt is not None:
                yield receipt

    def do_shard(self, context: stages.StageContext, shard_id: int) -> ShardReceipt | None:
        """What the three stages do to the store."""
        world = self.world
        if stages.is_draining(context):
            return None
        if world.store.head(GENERATION.commit_key(shard_id)) is not None:
            return None
        world.sleep(self.shard_s * world.rng.random())
        shard = AnnotatedShard(
            shard_id=shard_id, frames=_frames(shard_id), class_ids=None, depth=None, certainty=()
        )
        publish = stages.PublishShard(context).publish
        if not world.is_calm and world.rng.random() < 0.05:
            # Ray lost the answer and repeats the task, with the same arguments.
            publish(shard)
            world.counts["repeated tasks"] += 1
        return publish(shard)

    def commit(
        self,
        store: Store,
        generation: Generation,
        plan_id: str,
        shard_id: int,
        frames: tuple[FrameRecord, ...],
        data: bytes,
    ) -> tuple[CommitRecord, bool]:
        """The real commit, watched."""
        record, won = commit.commit_attempt(store, generation, plan_id, shard_id, frames, data)
        if record != self.records.get(shard_id):
            self.world.fail("a worker reports the record that stands")
        elif won != (record.files[0].sha256 == hashlib.sha256(data).hexdigest()):
            self.world.fail("a worker knows whether it won")
        self.world.counts["commits won" if won else "commits lost"] += 1
        return record, won

    def encode(self, shard: AnnotatedShard) -> bytes:
        """An attempt's bytes, which no other attempt writes."""
        self._num_attempts += 1
        return f"shard {shard.shard_id}, attempt {self._num_attempts}".encode()

    # The rules.

    def asked(self, client: Client, request: Request) -> None:
        if request.verb == "list" and request.key == GENERATION.data_prefix and not request.data:
            self._collected_at[client] = self.world.now_s
        if request.verb in {"create", "put"} and request.key == GENERATION.success_key:
            self._markers.add(request.data)
            if len(self._markers) > 1:
                self.world.fail("the success marker is the same, whoever writes it")

    def changed(self, actor: str, key: str, before: bytes | None, after: bytes | None) -> None:
        rule = self._broken_by(key, before, after)
        if rule is not None:
            self.world.fail(f"{rule} ({key} by {actor})")

    def _broken_by(self, key: str, before: bytes | None, after: bytes | None) -> str | None:
        if before is not None and key.startswith(FIXED):
            return f"{_kind(key)} never changes"
        if after is not None:
            self._written_at[key] = self.world.now_s
        rule = self._rules.get(_folder(key))
        return None if rule is None else rule(key, after)

    def _committed(self, key: str, data: bytes | None) -> str | None:
        assert data is not None
        record = CommitRecord.from_json(data)
        if key != GENERATION.commit_key(record.shard_id) or record.shard_id in self.records:
            return "a shard has one record"
        self.records[record.shard_id] = record
        held = self._winning(record.shard_id)
        if held is None:
            return "the record's data stays"
        return self._mismatch(record, held)

    def _data_changed(self, key: str, after: bytes | None) -> str | None:
        named = attempt_of(key)
        assert named is not None
        record = self.records.get(named[0])
        if record is None:
            # Nobody may delete what may still win; its own writer only does after a loss.
            return "attempts at an undecided shard are not collected" if after is None else None
        if record.attempt != named[1]:
            return None
        return "the record's data stays" if after is None else self._mismatch(record, after)

    def _mismatch(self, record: CommitRecord, data: bytes) -> str | None:
        (file,) = record.files
        said = (file.size_bytes, file.sha256)
        if (len(data), hashlib.sha256(data).hexdigest()) != said:
            return "the record's data is what the record says"
        return None

    def _plan_changed(self, key: str, after: bytes | None) -> str | None:
        if key == GENERATION.plan_key:
            assert after is not None
            self._parts = {part["key"] for part in json.loads(after)["parts"]}
            if not all(part in self.world.objects for part in self._parts):
                return "the plan's parts are there before the plan"
        elif after is None and key in self._parts:
            return "the plan's parts stay"
        return None

    def _drawn(self, key: str, data: bytes | None) -> str | None:
        shard_id = int(key.removeprefix(PNG_PREFIX))
        if shard_id not in self.records or data != self._winning(shard_id):
            return "PNGs are of the winning bytes"
        return None

    def _succeeded(self, _key: str, _data: bytes | None) -> str | None:
        if len(self.records) != self.num_shards:
            return "success means that every shard is decided"
        return None

    def _sealed(self, key: str, data: bytes | None) -> str | None:
        if data is None:
            return "snapshots stay"
        self.world.counts["snapshots"] += 1
        # Readers pass over one that is wrong in itself, but a driver must not write it.
        with contextlib.suppress(DamagedError):
            ranges, table = manifest._parse_snapshot(key, data, PLAN_ID, self.num_shards)
            expected = [
                self.records.get(shard_id)
                for shard_id in range(self.num_shards)
                if shard_id // self.shards_per_range in ranges
            ]
            if list(manifest.sealed_records(table, PLAN_ID)) == expected:
                return None
        return "a snapshot is what the records say"

    def _winning(self, shard_id: int) -> bytes | None:
        (file,) = self.records[shard_id].files
        return self.world.objects.get(GENERATION.prefix + file.path)

    def note_lease(self, number: int) -> None:
        """A driver believes that this lease is its own."""
        world, me = self.world, self.world.me
        if number in self._leases:
            world.fail("no two drivers hold one lease")
        self._leases[number] = me
        if me.process.disturbed and world.rng.random() < 0.2:
            # SIGTERM: the driver asks itself to stop.
            world.counts["signals"] += 1
            stop = partial(self._stop, number)
            world.spawn(me.process, f"{me.name} SIGTERM", stop, 10 ** world.rng.uniform(-0.5, 1.5))

    def _check_result(self, me: Client, result: RunResult) -> None:
        world = self.world
        if result.outcome == "interrupted":
            number = max(number for number, client in self._leases.items() if client is me)
            if cancel_key(number) not in world.objects:
                world.fail("only who is asked to stop is interrupted")
            return
        decided = list(self.records.values())
        num_ok = sum(record.num_ok for record in decided)
        num_bad = sum(record.num_rows for record in decided) - num_ok
        said = (result.num_done, result.num_shards, result.num_ok, result.num_quarantined)
        if said != (len(decided), self.num_shards, num_ok, num_bad):
            world.fail("a run that is done says what is decided")
        if GENERATION.success_key not in world.objects:
            world.fail("a run that is done has left the success marker")
        since_s = self._collected_at.get(me, world.now_s)
        if any(self._written_at[key] < since_s for key in self._orphans()):
            world.fail("a run that is done leaves no orphan")

    def _orphans(self) -> Iterator[str]:
        for key in self.world.objects:
            named = attempt_of(key)
            if named is not None:
                record = self.records.get(named[0])
                if record is None or record.attempt != named[1]:
                    yield key
            elif _is_plan_part(key) and key not in self._parts:
                yield key

    def _check_rest(self) -> None:
        """Nobody is left, and nothing is under way."""
        world = self.world
        if sorted(self.records) != list(range(self.num_shards)):
            world.fail("every shard is decided")
        commits = [key for key in world.objects if key.startswith(GENERATION.commit_prefix)]
        if sorted(commits) != [GENERATION.commit_key(n) for n in range(self.num_shards)]:
            world.fail("a shard has one record")
        if set(self._orphans()):
            world.fail("a resume leaves no orphan")
        if _counts(world.objects.get(GENERATION.success_key)) != _summary(self.num_shards):
            world.fail("the success marker says what was planned")
        if self.has_pngs:
            made = {key.removeprefix(PNG_PREFIX) for key in world.objects if key.startswith("png/")}
            if made != {str(shard_id) for shard_id in self.records}:
                world.fail("every shard's PNGs are there")

    def _count(self) -> None:
        counts = self.world.counts
        counts["requests"] += self.world.num_requests
        counts["drivers"] += len(self._leases)
        counts["shards"] += len(self.records)
        counts["seeds with 16 drivers"] += self.num_drivers == 16


class _Workers:
    """Worker processes of one driver; Ray's part is to repeat what dies or falls silent."""

    def __init__(self, job: SimulatedJob, context: stages.StageContext, todo: deque[int]) -> None:
        self._job, self._context, self._todo = job, context, todo
        self._driver = job.world.me
        self._done: deque[ShardReceipt | StorageError | None] = deque()
        self._running: dict[int, tuple[Process, float]] = {}
        self._left = len(todo)
        self._num_started = 0

    def receipts(self) -> Iterator[ShardReceipt]:
        for _ in range(min(self._job.num_workers, len(self._todo))):
            self._start()
        while self._left:
            while self._done:
                receipt = self._done.popleft()
                self._left -= 1
                if isinstance(receipt, StorageError):
                    raise JobError(str(receipt)) from receipt
                if receipt is not None:
                    yield receipt
            if self._left:
                self._job.world.wait(_SILENT_WORKER_S / 2)
                self._replace()

    def _start(self) -> None:
        world = self._job.world
        self._num_started += 1
        if self._num_started > _MOST_WORKERS:
            message = "workers die again and again"
            raise JobError(message)
        name = f"{self._driver.name}.{self._num_started}"
        process = world.process(name, disturbed=self._driver.process.disturbed)
        world.spawn(process, name, partial(self._work, process))

    def _replace(self) -> None:
        world = self._job.world
        for shard_id, (process, since_s) in list(self._running.items()):
            if not process.is_alive or world.now_s - since_s > _SILENT_WORKER_S + self._job.shard_s:
                # A silent one may be a zombie, and go on later.
                world.counts["workers replaced"] += 1
                del self._running[shard_id]
                self._todo.append(shard_id)
                self._start()

    def _work(self, process: Process) -> None:
        world = self._job.world
        while self._todo and self._driver.process.is_alive and not self._driver.has_ended:
            shard_id = self._todo.popleft()
            mine = (process, world.now_s)
            self._running[shard_id] = mine
            result: ShardReceipt | StorageError | None
            try:
                result = self._job.do_shard(self._context, shard_id)
            except StorageError as error:
                result = error
            if self._running.get(shard_id) is mine:
                del self._running[shard_id]
                self._done.append(result)
                world.rouse(self._driver)


class _SimulatedPlanner:
    """The same shards whoever plans."""

    def __init__(self, *_: object) -> None:
        self._num_shards = _here().num_shards

    def shards(self) -> Iterator[ShardSpec]:
        return (_shard(shard_id) for shard_id in range(self._num_shards))

    def plan(self, parts: Sequence[PlanPart]) -> Plan:
        return Plan(
            plan_id=PLAN_ID,
            num_shards=self._num_shards,
            num_frames=sum(len(_frames(shard_id)) for shard_id in range(self._num_shards)),
            num_known_errors=0,
            num_images=self._num_shards,
            num_videos=0,
            num_ignored=0,
            size_bytes=0,
            video_duration_s=0,
            num_pixels=0,
            parts=tuple(parts),
        )


class _Event:
    """``threading.Event`` in virtual time."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[Client] = []

    def set(self) -> None:
        self._is_set = True
        for client in self._waiting:
            _here().world.rouse(client)

    def wait(self, timeout: float) -> bool:
        if not self._is_set:
            world = _here().world
            self._waiting.append(world.me)
            world.wait(timeout)
            self._waiting.remove(world.me)
        return self._is_set


class _Thread:
    """``threading.Thread`` as one more client of the same process."""

    def __init__(self, *, target: Callable[[], None], name: str, daemon: bool) -> None:
        assert daemon
        self._target, self._name = target, name
        self._client: Client | None = None

    def start(self) -> None:
        me = _here().world.me
        self._client = _here().world.spawn(me.process, f"{me.name} {self._name}", self._target)

    def join(self) -> None:
        assert self._client is not None
        _here().world.join(self._client)


class _QuietProgress:
    """A bar that nobody sees."""

    rate = 1.0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "_QuietProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, *_: object, **__: object) -> None:
        pass


class _SnapshotTables:
    """Instead of ``pyarrow.parquet``: Arrow's own encoding, 60 times as fast, in most seeds."""

    @staticmethod
    def write_table(table: pa.Table, sink: pa.NativeFile, **options: object) -> None:
        if _here().uses_parquet:
            pq.write_table(table, sink, **options)
        else:
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)

    @staticmethod
    def parse(data: bytes) -> pa.Table:
        if _here().uses_parquet:
            return parse_parquet(data)
        return pa.ipc.open_stream(data).read_all()


_job: SimulatedJob | None = None


def _here() -> SimulatedJob:
    assert _job is not None
    return _job


@contextlib.contextmanager
def simulation() -> Iterator[None]:
    """Everything that ``simulate`` replaces, replaced; put back at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (layout, manifest, planner, runner):
            patch.setattr(module, "SHARDS_PER_RANGE", layout.SHARDS_PER_RANGE)
        for module in (commit, lease, planner):
            patch.setattr(module, "uuid", SimpleNamespace(uuid4=_uuid))
        clock = SimpleNamespace(monotonic=_now_s, perf_counter=_now_s, sleep=_sleep)
        patch.setattr(stages, "time", clock)
        patch.setattr(runner, "time", clock)
        patch.setattr("pipeline.storage.commit.time", clock)
        patch.setattr("pipeline.storage.commit.random", SimpleNamespace(uniform=_uniform))
        patch.setattr(lease, "HEARTBEAT_S", lease.HEARTBEAT_S)
        patch.setattr(lease, "datetime", _DATETIME)
        patch.setattr(lease, "os", SimpleNamespace(getpid=lambda: _process().pid, kill=_kill))
        patch.setattr(lease, "socket", SimpleNamespace(gethostname=lambda: _process().host))
        patch.setattr(lease, "threading", SimpleNamespace(Event=_Event, Thread=_Thread))
        patch.setattr(lease, "asdict", vars)  # the same for plain fields, and 20 times as fast
        patch.setattr(manifest, "pq", _SnapshotTables)
        patch.setattr(manifest, "parse_parquet", _SnapshotTables.parse)
        patch.setattr(planner, "Planner", _SimulatedPlanner)
        patch.setattr(claim, "Planner", _SimulatedPlanner)
        patch.setattr(planner, "_parquet", _part)
        patch.setattr(runner, "say", lambda _line: None)
        patch.setattr(runner, "Progress", _QuietProgress)
        patch.setattr(runner, "connect", _connect)
        patch.setattr(runner, "take_lease", _take_lease)
        patch.setattr(graph, "run_graph", _run_graph)
        patch.setattr(graph, "run_png_graph", _run_png_graph)
        patch.setattr(stages, "cached_store", lambda _url, _options: _here().world.store)
        patch.setattr(stages, "encode_shard", lambda shard, *_, **__: _here().encode(shard))
        patch.setattr(stages, "commit_attempt", lambda *given: _here().commit(*given))
        patch.setattr(stages, "write_png_tree", _write_pngs)
        for held in (*vars(GenerationView).values(), *vars(History).values()):
            if hasattr(held, "lock"):
                # Python 3.11 locks a cached property for all instances while one computes it:
                # here others have their turn meanwhile.
                patch.setattr(held, "lock", contextlib.nullcontext())
        # Tables of a few rows are not worth a handover to Arrow's threads.
        num_threads = pa.cpu_count()
        pa.set_cpu_count(1)
        try:
            yield
        finally:
            pa.set_cpu_count(num_threads)


def _set_shards_per_range(number: int) -> None:
    for module in (layout, manifest, planner, runner):
        module.SHARDS_PER_RANGE = number


def _process() -> Process:
    return _here().world.me.process


def _uuid() -> UUID:
    return UUID(int=_here().world.rng.getrandbits(128))


def _uniform(low: float, high: float) -> float:
    return _here().world.rng.uniform(low, high)


def _now_s() -> float:
    return _here().world.now_s


def _sleep(seconds: float) -> None:
    _here().world.sleep(seconds)


def _now(_zone: datetime.tzinfo) -> datetime.datetime:
    return _EPOCH + datetime.timedelta(seconds=_now_s() + _process().skew_s)


_DATETIME = SimpleNamespace(
    UTC=datetime.UTC,
    datetime=SimpleNamespace(now=_now, fromisoformat=datetime.datetime.fromisoformat),
)


def _kill(pid: int, _signal: int) -> None:
    for process in _here().world.processes:
        if process.pid == pid and process.is_alive:
            return
    raise ProcessLookupError(pid)


@contextlib.contextmanager
def _connect(_settings: object) -> Iterator[Cluster]:
    yield Cluster(num_cpus=2.0, num_gpus=0.0, embedded=True)


def _take_lease(store: Store, *given: Any) -> int:
    number = lease.take_lease(store, *given)
    _here().note_lease(number)
    return number


def _run_graph(
    context: stages.StageContext, parts: Sequence[graph.PendingPart], *_: object
) -> Iterator[ShardReceipt]:
    return _here().annotate(context, parts)


def _run_png_graph(
    context: stages.StageContext, data_keys: Sequence[tuple[int, str, str]]
) -> Iterator[ShardReceipt]:
    store = context.store()
    for shard_id, key, _ in data_keys:
        try:
            stages.make_pngs(store, context.layout, shard_id, store.read(key))
        except StorageError as error:
            raise JobError(str(error)) from error
        yield ShardReceipt(shard_id=shard_id, won=False, num_rows=0, num_ok=0, size_bytes=0)


def _write_pngs(store: Store, data: bytes, *, anew: bool, newer: Generation) -> None:
    assert not anew
    assert newer.number == 1
    shard_id = int(data.split(b",")[0].removeprefix(b"shard "))
    store.put(f"{PNG_PREFIX}{shard_id}", data)


@cache
def _frames(shard_id: int) -> tuple[FrameRecord, ...]:
    """Planned frames of a shard; one of every third shard's is bad."""
    return tuple(
        FrameRecord(
            asset=f"{shard_id}.jpg",
            frame_index=index,
            pts_s=None,
            width=64,
            height=64,
            error_kind="corrupt" if (shard_id + index) % 3 == 2 else None,
        )
        for index in range(1 + shard_id % 2)
    )


@cache
def _shard(shard_id: int) -> ShardSpec:
    return ShardSpec(
        shard_id=shard_id, root="/archive", input_width_px=64, input_height_px=64, slices=()
    )


def _part(shards: Sequence[ShardSpec]) -> bytes:
    return _encoded_part(tuple(shard.shard_id for shard in shards))


_real_parquet = planner._parquet


@cache
def _encoded_part(shard_ids: tuple[int, ...]) -> bytes:
    return _real_parquet([_shard(shard_id) for shard_id in shard_ids])


@cache
def _counts(marker: bytes | None) -> bytes | None:
    """A success marker without the digests of what is fixed, which follow from the objects."""
    if marker is None:
        return None
    fields = json.loads(marker)
    fields.pop("sha256", None)
    return canonical_json(fields)


def _summary(num_shards: int) -> bytes:
    frames = [frame for shard_id in range(num_shards) for frame in _frames(shard_id)]
    num_bad = sum(frame.error_kind is not None for frame in frames)
    return canonical_json(
        {
            "plan_id": PLAN_ID,
            "num_shards": num_shards,
            "num_rows": len(frames),
            "num_ok": len(frames) - num_bad,
            "quarantined": {"corrupt": num_bad} if num_bad else {},
        }
    )


def _folder(key: str) -> str:
    """The folder of the generation, or of the job, that a key lies in."""
    first, second = (*key.split("/", 2), "")[:2]
    return second if first == GENERATION.prefix[:-1] else first


def _is_plan_part(key: str) -> bool:
    return key.startswith(PLAN_FOLDER) and key.endswith(".parquet")


def _kind(key: str) -> str:
    if key.startswith(GENERATION.commit_prefix):
        return "the record"
    if key.startswith(LEASE_KEY):
        return "a lease"
    return "the plan" if key == GENERATION.plan_key else "the success marker"
