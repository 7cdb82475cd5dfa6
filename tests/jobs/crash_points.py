"""Every step of a job that changes its storage, by name; and a driver that dies at one of them.

A point is the n-th time that writes of one kind come to one step. Drivers run in processes forked
from a clean one that has everything imported, and die by SIGKILL.
"""

import errno
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import pyarrow as pa
from tqdm import tqdm

from pipeline.layout import Generation
from pipeline.storage import Store, local
from pipeline.storage.local import LocalStore

if TYPE_CHECKING:
    from pipeline.actors import WeightsFile

KINDS = (
    (r"job\.json", "job"),
    (r"weights/.*", "weights"),
    (r"probe/.*", "probe"),
    (r"lease/lease-.*", "lease"),
    (r"lease/heartbeat-.*", "heartbeat"),
    (r"lease/cancel-.*", "cancel marker"),
    (r"manifest/snapshot-.*", "snapshot"),
    (r"png/.*", "png"),
    (r"gen-\d+/plan/part-.*", "plan part"),
    (r"gen-\d+/plan/plan\.json", "plan"),
    (r"gen-\d+/attempts/.*", "death"),
    (r"gen-\d+/data/.*", "data"),
    (r"gen-\d+/commit/.*", "commit record"),
    (r"gen-\d+/png-done/.*", "png marker"),
    (r"gen-\d+/attempts/.*", "death"),
    (r"gen-\d+/_SUCCESS\.json", "success"),
)
BEFORE, AFTER = "before", "after"
UNSYNCED = "written, before its fsync"
UNLINKED = "before its link"
LINKED = "linked, before the folder's fsync"
UNRENAMED = "linked, before its rename"
HURRIED_TIMEOUT_S = 2
_HURRIED = {"throttling_base_scale": 0.02, "non_throttling_base_scale": 0.02}


class Point(NamedTuple):
    """A moment in a run.

    Attributes:
        label: Verb and kind of object.
        number: Which of the writes of that label that come so far, from 1.
        step: How far.
    """

    label: str
    number: int
    step: str

    def __str__(self) -> str:
        return f"{self.label} {self.number}: {self.step}"


def kind_of(key: str) -> str:
    """What an object of a job is, by its key."""
    for pattern, kind in KINDS:
        if re.fullmatch(pattern, key):
            return kind
    message = f"{key}: nobody has thought of a death at this kind of object"
    raise AssertionError(message)


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a forked driver shall do.

    Attributes:
        arguments: Its command line.
        environment: What to change in its environment.
        footage: File of the archive's ``Footage``; None decodes for real.
        die_at: Where it kills itself; None lets it run.
        rival: Whether another planner is faster by a hair.
        troubled: Whether the process that holds the model dies once, and Ctrl-C comes later.
        repeat_every: As of ``without_ray``.
        points: File that it writes the points to that it came by.
        disk_full: Share of its local writes that find the disk full, and a seed; None for none.
        hurried: Whether its S3 clients wait short times only.
        said: File for its standard error.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    footage: Path | None = None
    die_at: Point | None = None
    rival: bool = False
    troubled: bool = False
    repeat_every: int = 0
    points: Path | None = None
    disk_full: tuple[float, int] | None = None
    hurried: bool = False
    said: Path


def start(orders: Orders) -> ForkServerProcess:
    """A driver in a process of its own."""
    process = _forks().Process(target=_work, args=(orders,), daemon=True)
    process.start()
    return process


def run(orders: Orders) -> int:
    """Run a driver to its end; its exit code, ``-SIGKILL`` if it died of that."""
    process = start(orders)
    process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code


def points_of(orders: Orders) -> list[Point]:
    """What a run has written down."""
    assert orders.points is not None
    return [Point(*item) for item in json.loads(orders.points.read_text())]


@cache
def _forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.jobs.crash_points_preload"])
    return context


def _work(orders: Orders) -> None:
    import jobs.cli
    from tests.jobs.local_graph import Footage, without_ray

    # Its own lock is a semaphore of the system, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())
    os.environ.update(orders.environment)
    descriptor = os.open(orders.said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    watch = Watch(orders.die_at, orders.disk_full)
    with ExitStack() as stack:
        stack.enter_context(without_ray(repeat_every=orders.repeat_every))
        stack.enter_context(watch.watching())
        if orders.footage is not None:
            stack.enter_context(Footage.load(orders.footage).used())
        if orders.hurried:
            stack.enter_context(hurried_clients())
        if orders.rival:
            stack.enter_context(_rival_planner())
        if orders.troubled:
            # Where notes of the dead lie.
            stack.enter_context(patch("tempfile.tempdir", str(orders.said.parent)))
            stack.enter_context(_trouble())
        code = jobs.cli.run(orders.arguments)
    if orders.points is not None:
        orders.points.write_text(json.dumps(watch.points))
    sys.exit(code)


@contextmanager
def hurried_clients() -> Iterator[None]:
    """As many retries as ever, but short pauses, and ``HURRIED_TIMEOUT_S`` for an answer."""
    with ExitStack() as stack:
        for name, value in (
            ("pipeline.storage.s3_clients._STALL_TIMEOUT_S", HURRIED_TIMEOUT_S),
            ("pipeline.storage.s3_clients._PUT_TIMEOUT_S", HURRIED_TIMEOUT_S),
            ("pipeline.storage.s3_clients._MAX_BACKOFF_S", 0.2),
            ("pipeline.storage.commit._FIRST_PAUSE_S", 0.01),
            ("pipeline.storage.commit._LONGEST_PAUSE_S", 0.1),
            ("botocore.retries.standard.ExponentialBackoff._DEFAULT_BACKOFF_CONFIG", _HURRIED),
        ):
            stack.enter_context(patch(name, value))
        yield


@contextmanager
def _rival_planner() -> Iterator[None]:
    """Let another planner of the same archive fix its plan just before the first one does."""
    import jobs.planner
    from jobs.record import read_job

    plain, busy = jobs.planner.create_once, []

    def create_once(store: Store, key: str, data: bytes) -> bytes:
        if kind_of(key) == "plan" and not busy:
            busy.append(key)
            spec = read_job(store).job_spec()
            jobs.planner.make_plan(store, Generation(0), jobs.planner.Planner(spec))
        return plain(store, key, data)

    with patch("jobs.planner.create_once", create_once):
        yield


@contextmanager
def _trouble() -> Iterator[None]:
    """Let a process die of the first shard, and Ctrl-C come while the second is in the model."""
    from jobs.lease import is_cancelled
    from pipeline import stages
    from pipeline.deaths import Journal
    from tests.jobs import local_graph

    class Stricken(local_graph.AnnotateStandIn):
        def __init__(self, context: stages.StageContext, weights: "WeightsFile") -> None:
            super().__init__(context, weights)
            self._context, self._num_seen = context, 0
            place = context.store(), context.layout, context.lease
            lost = Journal(*place)
            lost.note(0)
            # With the process goes the lock, and Ray starts another one.
            os.close(lost._taken[0])
            Journal(*place)

        def __call__(self, table: pa.Table) -> pa.Table:
            self._num_seen += 1
            if self._num_seen == 2:
                os.kill(os.getpid(), signal.SIGINT)
                while not is_cancelled(self._context.store(), self._context.lease):
                    time.sleep(0.01)
                # Else the stages would look for the marker once a second only.
                stages._drain_seen.clear()
            return super().__call__(table)

    with patch.object(local_graph, "AnnotateStandIn", Stricken):
        yield


class Watch:
    """Notes every step that changes a store, and may end the process at one.

    Args:
        die_at: At which.
        disk_full: Share of the local writes that find the disk full at one of their steps, and a
            seed; None for none.
    """

    def __init__(
        self, die_at: Point | None = None, disk_full: tuple[float, int] | None = None
    ) -> None:
        self.points: list[Point] = []
        self._die_at = die_at
        self._full_share, seed = disk_full or (0.0, 0)
        self._rng = random.Random(seed)
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._current = threading.local()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all stores of this process."""
        from pipeline.storage.s3 import S3Store

        with ExitStack() as stack:
            for kind in (LocalStore, S3Store):
                for verb in ("put", "create"):
                    write = self._write(verb, getattr(kind, verb))
                    stack.enter_context(patch.object(kind, verb, write))
            one_by_one = self._delete_each(LocalStore.delete)
            stack.enter_context(patch.object(LocalStore, "delete", one_by_one))
            batch = self._delete_batch(S3Store._delete_batch)
            stack.enter_context(patch.object(S3Store, "_delete_batch", batch))
            stack.enter_context(self._steps_of_a_file())
            yield

    @contextmanager
    def _steps_of_a_file(self) -> Iterator[None]:
        link, sync_folder, sync, replace = (
            local._link,
            local._sync_folder,
            os.fsync,
            Path.replace,
        )

        def watched_sync(descriptor: int) -> None:
            self._step(UNSYNCED)
            sync(descriptor)

        def watched_link(source: Path, target: Path) -> None:
            self._step(UNLINKED)
            link(source, target)
            self._current.linked = True

        def watched_sync_folder(folder: Path) -> None:
            # Making a folder syncs its parent, too.
            if getattr(self._current, "linked", False):
                self._step(LINKED)
            with self._paused():
                sync_folder(folder)

        def watched_replace(source: Path, target: Path) -> Path:
            self._step(UNRENAMED)
            return replace(source, target)

        with (
            patch.object(local, "_link", watched_link),
            patch.object(local, "_sync_folder", watched_sync_folder),
            patch.object(os, "fsync", watched_sync),
            patch.object(Path, "replace", watched_replace),
        ):
            yield

    def _write(self, verb: str, plain: Callable[..., None]) -> Callable[..., None]:
        def write(store: Store, key: str, data: bytes) -> None:
            with self._named(f"{verb} {kind_of(key)}"):
                self._step(BEFORE)
                plain(store, key, data)
                self._step(AFTER)

        return write

    def _delete_each(self, plain: Callable[..., None]) -> Callable[..., None]:
        def delete(store: Store, keys: Iterable[str]) -> None:
            for key in keys:
                with self._named(f"delete {kind_of(key)}"):
                    self._step(BEFORE)
                    plain(store, [key])
                    self._step(AFTER)

        return delete

    def _delete_batch(self, plain: Callable[..., None]) -> Callable[..., None]:
        def delete(store: Any, names: Sequence[str]) -> None:
            kinds = sorted({kind_of(name.removeprefix(store._base)) for name in names})
            with self._named(f"delete {' and '.join(kinds)}"):
                self._step(BEFORE)
                plain(store, names)
                self._step(AFTER)

        return delete

    @contextmanager
    def _named(self, label: str) -> Iterator[None]:
        self._current.label, self._current.linked = label, False
        with self._lock:
            is_full = self._rng.random() < self._full_share
            step = self._rng.choice((UNSYNCED, UNLINKED, LINKED))
            self._current.full_at = step if is_full else None
        try:
            yield
        finally:
            self._current.label = None

    @contextmanager
    def _paused(self) -> Iterator[None]:
        label, self._current.label = getattr(self._current, "label", None), None
        try:
            yield
        finally:
            self._current.label = label

    def _step(self, step: str) -> None:
        label = getattr(self._current, "label", None)
        if label is None:
            return
        with self._lock:
            self._numbers[label, step] += 1
            point = Point(label, self._numbers[label, step], step)
            if point == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.points.append(point)
        if step == self._current.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
