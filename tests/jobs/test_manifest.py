"""Which shards are decided: sealed ranges plus a fresh listing of the open ones."""

import dataclasses

import pyarrow as pa
import pytest

from jobs import manifest
from jobs.finish import collect_orphans, write_success
from jobs.manifest import Manifest, drop_damaged_snapshots
from jobs.runner import pending_parts
from pipeline.errors import JobError
from pipeline.layout import SHARDS_PER_RANGE, Generation
from pipeline.records import CommitRecord, DataFile
from pipeline.storage import open_store
from tests.jobs.job_parts import make_job

GENERATION = Generation()
PLAN_ID = "plan"


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "job"), create=True)


def commit(store, shard_ids, plan_id=PLAN_ID):
    for shard_id in shard_ids:
        record = CommitRecord(
            shard_id=shard_id,
            plan_id=plan_id,
            attempt=f"{shard_id:032x}",
            files=(DataFile(path=f"data/{shard_id}.parquet", size_bytes=1, sha256="0f" * 32),),
            num_rows=2,
            num_ok=1,
            quarantined=(("a.jpg", shard_id, "corrupt", "broken"),),
        )
        store.create(GENERATION.commit_key(shard_id), record.to_json())


def load(store, num_shards):
    return Manifest.load(store, GENERATION, PLAN_ID, num_shards)


def test_nothing_is_decided_at_first(store):
    found = load(store, 5)
    assert (found.num_done, found.is_complete) == (0, False)
    assert found.done().tolist() == [False] * 5
    assert list(found.records()) == []


def test_open_records_are_listed_afresh(store):
    commit(store, [0, 3])
    found = load(store, 5)
    assert found.done().tolist() == [True, False, False, True, False]
    assert [record.shard_id for record in found.records()] == [0, 3]
    commit(store, [1])
    assert load(store, 5).num_done == 3


def test_complete_ranges_are_sealed_and_never_listed_again(store):
    num_shards = SHARDS_PER_RANGE + 3
    commit(store, range(SHARDS_PER_RANGE + 1))
    before = load(store, num_shards)
    sealed = before.seal()
    assert sealed.sealed_ranges == {0}
    assert sealed.open_ids == (SHARDS_PER_RANGE,)
    expected = list(before.records())
    # The snapshot answers even if the folder is out of reach.
    store.delete([GENERATION.commit_key(shard_id) for shard_id in range(SHARDS_PER_RANGE)])
    again = load(store, num_shards)
    assert list(again.records()) == expected
    assert again.num_done == SHARDS_PER_RANGE + 1
    commit(store, [SHARDS_PER_RANGE + 1, SHARDS_PER_RANGE + 2])
    final = load(store, num_shards).seal()
    assert final.is_complete
    assert final.sealed_ranges == {0, 1}
    assert load(store, num_shards).open_ids == ()


def test_sealing_twice_writes_the_same_object(store):
    commit(store, range(3))
    load(store, 3).seal()
    Manifest.load(store, GENERATION, PLAN_ID, 3).seal()
    assert len(list(store.list("manifest/"))) == 1


@pytest.mark.parametrize("name", ["shard-00000001.json~", ".DS_Store", "shard-00000001", "x"])
def test_a_stray_file_is_no_record(store, name):
    commit(store, [0])
    store.put(f"gen-0000/commit/00000/{name}", b"{}")
    assert load(store, 2).open_ids == (0,)
    assert not load(store, 2).is_complete


def test_a_damaged_snapshot_is_only_a_lost_cache(store):
    commit(store, range(3))
    load(store, 3).seal()
    store.put(f"manifest/snapshot-0000-999999-{'f' * 12}.parquet", b"junk")
    assert load(store, 3).sealed_ranges == {0}
    for item in list(store.list("manifest/")):
        store.put(item.key, b"junk")
    assert load(store, 3).open_ids == (0, 1, 2)


@pytest.mark.parametrize(
    ("shard_ids", "ranges"),
    [
        ([0], [0]),
        ([0, 0, 1], [0]),
        ([0, 0], [0]),
        ([0, 1, 77], [0]),
        ([0, 1], [0, 1]),
        ([77], [77]),
    ],
)
def test_a_snapshot_of_other_shards_than_its_ranges_is_passed_over(store, shard_ids, ranges):
    commit(store, range(2))
    commit(store, [77])
    records = {record.shard_id: record for record in load(store, 1078).records()}
    table = pa.Table.from_pylist(
        [manifest._row(records[item]) for item in shard_ids], schema=manifest.SNAPSHOT_SCHEMA
    )
    store.delete([GENERATION.commit_key(77)])
    manifest._write_snapshot(store, GENERATION, PLAN_ID, frozenset(ranges), table)
    found = load(store, 2)
    assert (found.sealed_ranges, found.open_ids) == (frozenset(), (0, 1))
    assert found.done().tolist() == [True, True]
    (dropped,) = drop_damaged_snapshots(store, GENERATION, PLAN_ID, 2)
    assert not store.exists(dropped)


def test_a_record_outside_the_plan_stops_the_run(store):
    store.put("gen-0000/commit/00000/shard-00000009.json", b"{}")
    with pytest.raises(JobError, match="does not belong to this plan"):
        load(store, 5)


def test_another_plan_s_record_stops_the_run(store):
    commit(store, [0], plan_id="other")
    with pytest.raises(JobError, match="expected plan"):
        list(load(store, 2).records())


def test_pending_parts_leave_out_what_is_done(tmp_path):
    job = make_job(tmp_path)
    job.publish([1, 3])
    found = Manifest.load(job.store, GENERATION, job.plan.plan_id, job.plan.num_shards)
    (part,) = pending_parts(job.plan, found, backwards=False)
    assert part.shard_ids == (0, 2, 4, 5)
    (part,) = pending_parts(job.plan, found, backwards=True)
    assert part.shard_ids == (5, 4, 2, 0)


def test_only_losers_of_decided_shards_are_collected(tmp_path):
    job = make_job(tmp_path)
    job.publish([0])
    loser = GENERATION.data_key(0, "f" * 32)
    undecided = GENERATION.data_key(1, "e" * 32)
    part = GENERATION.plan_part_key("d" * 32, 0)
    for key in (loser, undecided, part):
        job.store.put(key, b"x")
    found = Manifest.load(job.store, GENERATION, job.plan.plan_id, job.plan.num_shards)
    assert collect_orphans(job.store, GENERATION, job.plan, list(found.records())) == 2
    assert [job.store.exists(key) for key in (loser, undecided, part)] == [False, True, False]
    assert job.store.exists(job.plan.parts[0].key)
    assert len(list(job.store.list(GENERATION.data_prefix))) == 2


def test_nothing_is_collected_below_a_link(tmp_path):
    """Not even below one's own: it may lead to another job."""
    job = make_job(tmp_path)
    job.publish([0])
    found = Manifest.load(job.store, GENERATION, job.plan.plan_id, job.plan.num_shards)
    outside = tmp_path / "outside"
    outside.mkdir()
    names = [
        GENERATION.data_key(0, "f" * 32),
        GENERATION.plan_part_key("d" * 32, 0),
        f"manifest/snapshot-0000-000001-{'a' * 12}.parquet",
        "table.parquet",
    ]
    theirs = {outside / name.rpartition("/")[2] for name in names}
    for path in theirs:
        path.write_bytes(b"somebody's")
    (tmp_path / "job/manifest").mkdir()
    for folder in ("gen-0000/data", "gen-0000/plan", "manifest"):
        (tmp_path / "job" / folder / "link").symlink_to(outside)
    assert collect_orphans(job.store, GENERATION, job.plan, list(found.records())) == 0
    of_plan = GENERATION, job.plan.plan_id, job.plan.num_shards
    assert drop_damaged_snapshots(job.store, *of_plan) == []
    assert set(outside.iterdir()) == theirs


def test_success_is_the_same_whoever_writes_it(tmp_path):
    job = make_job(tmp_path)
    job.publish(range(job.plan.num_shards))
    records = list(
        Manifest.load(job.store, GENERATION, job.plan.plan_id, job.plan.num_shards).records()
    )
    write_success(job.store, GENERATION, job.plan, records)
    first = job.store.read(GENERATION.success_key)
    write_success(
        job.store, GENERATION, job.plan, [dataclasses.replace(record) for record in records[::-1]]
    )
    assert job.store.read(GENERATION.success_key) == first
