"""The commit protocol, model checked: every schedule of two workers and a collector, with faults.

The code under test is real: ``commit_attempt`` and ``create_once`` in the workers, ``Manifest`` and
``collect_orphans`` in the collector, called as the end of a run calls them. Replaced are only the
pauses, where the attempts' names come from, and how often a create is tried (once or twice, so that
few faults reach the giving up). ``tests.virtual_store`` says which faults there are and what is not
modelled. Then mutants are put in, the design's five and two more, and each must be found out.
"""

import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import cast
from uuid import UUID

import pytest

from jobs import runner
from jobs.manifest import Manifest
from jobs.plan import Plan
from pipeline import commit
from pipeline.errors import StorageError
from pipeline.layout import Generation, attempt_of
from pipeline.records import CommitRecord, FrameRecord
from pipeline.storage import Store, create_once
from tests.mutants import (
    Mutant,
    cleaned_in_doubt,
    collected_undecided,
    exists_then_put,
    same_data_key,
    trusted_refusal,
    uncollected,
    unconditional_put,
)
from tests.virtual_store import Explorer, Objects, Place, Program

GENERATION = Generation()
COMMIT_KEY = GENERATION.commit_key(0)
FRAMES = (FrameRecord(asset="a.jpg", frame_index=0, pts_s=None, width=64, height=64),)
WORKERS = ("worker 1", "worker 2")

_names = random.Random()


def plan_of(num_shards: int) -> Plan:
    """A plan of which only shard 0 is ever tried; if it is the only one, its range is sealed."""
    return Plan(
        plan_id="plan",
        num_shards=num_shards,
        num_frames=num_shards,
        num_known_errors=0,
        num_images=num_shards,
        num_videos=0,
        num_ignored=0,
        size_bytes=0,
        video_duration_s=0,
        num_pixels=0,
    )


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


def drive(name: str, plan: Plan, store: Store) -> list[CommitRecord]:
    """A whole run by one more driver: what is not decided, then the end."""
    manifest = Manifest.load(store, GENERATION, plan.plan_id, plan.num_shards)
    if not manifest.done()[0]:
        work(name, store)
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


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    def next_name() -> UUID:
        return UUID(int=_names.getrandbits(128))

    monkeypatch.setattr("pipeline.storage.commit._pause", lambda _attempt: None)
    monkeypatch.setattr(commit, "uuid", SimpleNamespace(uuid4=next_name))
    try_creating(monkeypatch, 1)


def try_creating(patch: pytest.MonkeyPatch, attempts: int) -> None:
    patch.setattr(commit, "create_once", partial(create_once, attempts=attempts))


def explorer(
    plan: Plan, *, num_faults: int, third: Program | None = None, merge: bool = True
) -> Explorer:
    """Two workers and a collector, or something else in its stead, then one more run."""
    programs: dict[str, Program] = {name: partial(work, name) for name in WORKERS}
    programs["collector"] = third or partial(collect, plan)
    return Explorer(
        programs=programs,
        aftermath=partial(drive, "aftermath", plan),
        rules=CommitRules(),
        num_faults=num_faults,
        merge=merge,
    )


def check(search: Explorer, num_states: int) -> None:
    executions = search.run()
    print(
        f"PROOF model check, {search.num_faults} faults: {executions:,} schedules in "
        f"{search.num_states:,} states, {len(search.violations)} violations"
    )
    assert search.violations == {}
    # A search that has quietly collapsed finds nothing either.
    assert search.num_states >= num_states
    assert executions >= 1_000_000


@pytest.mark.parametrize(
    ("attempts", "num_shards", "num_faults", "num_states"),
    [(1, 1, 2, 10_000), (2, 2, 2, 20_000), (2, 1, 2, 20_000)],
)
def test_no_schedule_breaks_the_protocol(
    monkeypatch: pytest.MonkeyPatch,
    attempts: int,
    num_shards: int,
    num_faults: int,
    num_states: int,
) -> None:
    try_creating(monkeypatch, attempts)
    check(explorer(plan_of(num_shards), num_faults=num_faults), num_states)


def test_no_schedule_with_a_second_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    try_creating(monkeypatch, 2)
    plan = plan_of(1)
    third = partial(drive, "collector", plan)
    check(explorer(plan, num_faults=1, third=third), 10_000)


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (exists_then_put, "the record never changes"),
        (same_data_key, "the record's data is what the record says"),
        (unconditional_put, "the record never changes"),
        (trusted_refusal, "a worker knows whether it won"),
        (collected_undecided, "attempts at an undecided shard are not collected"),
        (cleaned_in_doubt, "the record's data stays"),
        (uncollected, "a resume leaves no orphan"),
    ],
)
def test_every_mutant_is_found_out(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, broken: str
) -> None:
    mutant(monkeypatch)
    search = explorer(plan_of(1), num_faults=1)
    search.run()
    print(*search.violations.items(), sep="\n")
    assert broken in search.violations
    print(f"PROOF mutant {mutant.__name__}: found, not {broken}")


@pytest.mark.parametrize(
    ("mutant", "num_faults"),
    [(None, 0), (exists_then_put, 0), (None, 1), (trusted_refusal, 1)],
)
def test_merging_equal_states_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant | None, num_faults: int
) -> None:
    if mutant is not None:
        mutant(monkeypatch)
    # With a fault the collector stays away: too many schedules to walk one by one.
    third = _stay_away if num_faults else None
    merged, walked = (
        explorer(plan_of(1), num_faults=num_faults, third=third, merge=merge)
        for merge in (True, False)
    )
    assert merged.run() == walked.run() > 100
    assert merged.violations == walked.violations


def _stay_away(_store: Store) -> None:
    pass
