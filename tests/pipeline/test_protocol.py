"""The commit protocol, model checked: every schedule of two workers, a collector and faults.

The code under test is real: ``commit_attempt`` and ``create_once`` in the workers, ``Manifest`` and
``collect_orphans`` in the collector, as the end of a run calls them; ``tests.virtual_store`` says
which faults there are. Only the pauses, the source of the attempts' names and the number of tries
are replaced. Each way to get the protocol wrong that its design lists must be found out.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import cast
from uuid import UUID

import pytest

from jobs import runner
from jobs.manifest import Manifest
from jobs.plan import Plan
from pipeline import commit
from pipeline.errors import ObjectExistsError, StorageError, StoreUnavailableError
from pipeline.layout import Generation, attempt_of
from pipeline.records import CommitRecord, FrameRecord
from pipeline.storage import Store, create_once
from tests.virtual_store import Explorer, Objects, Place, VirtualStore

GENERATION = Generation()
COMMIT_KEY = GENERATION.commit_key(0)
FRAMES = (FrameRecord(asset="a.jpg", frame_index=0, pts_s=None, width=64, height=64),)
WORKERS = ("worker 1", "worker 2")
COUNTS = dict.fromkeys(
    ("num_frames", "num_known_errors", "num_images", "num_videos", "num_ignored"), 0
)
SIZES = {"size_bytes": 0, "video_duration_s": 0.0, "num_pixels": 0}

Mutant = Callable[[pytest.MonkeyPatch], None]
_names = random.Random()


def plan_of(num_shards: int) -> Plan:
    """A plan of which only shard 0 is ever tried; with one shard, its range gets sealed."""
    return Plan(plan_id="plan", num_shards=num_shards, **COUNTS, **SIZES)


def work(name: str, store: Store) -> tuple[CommitRecord, bool]:
    """One attempt at shard 0, with bytes that no other client writes."""
    _names.seed(name)
    return commit.commit_attempt(store, GENERATION, "plan", 0, FRAMES, name.encode())


def collect(plan: Plan, store: Store) -> list[CommitRecord]:
    """The end of a run."""
    manifest = Manifest.load(store, GENERATION, plan.plan_id, plan.num_shards).seal()
    records = list(manifest.records())
    runner.collect_orphans(store, GENERATION, plan, records)
    return records


def resume(plan: Plan, store: Store) -> list[CommitRecord]:
    """A whole run."""
    manifest = Manifest.load(store, GENERATION, plan.plan_id, plan.num_shards)
    if not manifest.done()[0]:
        work("resume", store)
    return collect(plan, store)


class CommitRules:
    """What the protocol promises, whatever happens."""

    def step(self, actor: str, before: Objects, after: Objects) -> Iterator[str]:
        if COMMIT_KEY in before and after.get(COMMIT_KEY) != before[COMMIT_KEY]:
            yield "the record never changes"
        if not set(_below(after, GENERATION.commit_prefix)) <= {COMMIT_KEY}:
            yield "there is one record"
        if COMMIT_KEY in after:
            (file,) = _record(after[COMMIT_KEY]).files
            data = after.get(GENERATION.prefix + file.path)
            if data is None:
                yield "the record's data stays"
            elif (len(data), hashlib.sha256(data).hexdigest()) != (file.size_bytes, file.sha256):
                yield "the record's data is what the record says"
        elif actor not in WORKERS and set(_data(before)) - set(_data(after)):
            yield "attempts at an undecided shard are not collected"

    def end(self, actor: str, place: Place, objects: Objects, *, faultless: bool) -> Iterator[str]:
        if place.error is not None:
            if faultless or not isinstance(place.error, StorageError):
                yield "nothing but the store fails"
        elif actor in WORKERS:
            record, won = cast("tuple[CommitRecord, bool]", place.result)
            if COMMIT_KEY not in objects or record != _record(objects[COMMIT_KEY]):
                yield "a worker reports the record that stands"
            elif won != (record.files[0].sha256 == hashlib.sha256(actor.encode()).hexdigest()):
                yield "a worker knows whether it won"

    def rest(self, place: Place, objects: Objects, late: frozenset[str]) -> Iterator[str]:
        if COMMIT_KEY not in objects or place.result != [_record(objects[COMMIT_KEY])]:
            yield "a resume leaves the shard decided"
            return
        (file,) = _record(objects[COMMIT_KEY]).files
        if set(_data(objects)) - late != {GENERATION.prefix + file.path} - late:
            yield "a resume leaves no orphan"


def _below(objects: Objects, prefix: str) -> Iterator[str]:
    return (key for key in objects if key.startswith(prefix))


def _data(objects: Objects) -> Iterator[str]:
    return (key for key in objects if attempt_of(key))


@lru_cache
def _record(data: bytes) -> CommitRecord:
    return commit.parse_commit(data, "plan", 0)


def exists_then_put(patch: pytest.MonkeyPatch) -> None:
    def look_first(store: Store, key: str, data: bytes) -> bytes:
        if store.exists(key):
            return store.read(key)
        store.put(key, data)
        return data

    patch.setattr(commit, "create_once", look_first)


def same_data_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "uuid", SimpleNamespace(uuid4=lambda: UUID(int=0)))


def unconditional_put(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VirtualStore, "create", VirtualStore.put)


def trusted_refusal(patch: pytest.MonkeyPatch) -> None:
    class Trusting:
        """Tells ``create_once`` nothing new, and remembers that there was a 412."""


    def believe(store: Store, key: str, data: bytes) -> bytes:
        try:
            store.create(key, data)
        except ObjectExistsError:
            return store.read(key) + b" "  # the same record, but never taken for one's own
        return data

    patch.setattr(commit, "create_once", believe)


def collected_undecided(patch: pytest.MonkeyPatch) -> None:
    real = runner.collect_orphans
