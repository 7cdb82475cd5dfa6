"""Verify finds whatever is missing, doubled, foreign or changed, down to a byte."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import manifest
from jobs.findings import Findings
from jobs.png_tree import PngTree
from jobs.status import find_jobs, job_status
from jobs.verify import _check_tree, _Generation, verify_job
from pipeline.errors import StoreUnavailableError, UserError
from pipeline.layout import Generation
from pipeline.storage import StorageOptions, open_store
from pipeline.storage.local import LocalStore
from tests.jobs.job_parts import finish_job, make_job

GENERATION = Generation()


ANYWHERE = pytest.mark.parametrize("job_url", ["local", "S3"], indirect=True)


@pytest.fixture
def job(tmp_path, job_url):
    made = make_job(tmp_path, url=job_url)
    made.publish(range(made.plan.num_shards))
    return made


@pytest.fixture
def finished(job):
    finish_job(job)
    return job


def findings(job):
    return verify_job(job.store.url, StorageOptions())


def first_data(job):
    return min(item.key for item in job.store.list(GENERATION.data_prefix))


def rewrite_record(job, change):
    key = GENERATION.commit_key(0)
    fields = json.loads(job.store.read(key))
    change(fields)
    job.store.put(key, json.dumps(fields).encode())


@ANYWHERE
def test_a_whole_job_is_sound_and_complete(finished):
    found = findings(finished)
    assert found.is_complete
    assert (found.num_rows, found.num_frames, found.num_decided) == (11, 11, 6)


def test_an_unfinished_job_is_sound(tmp_path):
    job = make_job(tmp_path)
    job.publish([0, 1])
    found = findings(job)
    assert found.is_sound
    assert not found.is_complete
    assert found.undecided == {0: [2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("job_url", "place"),
    [("local", 0), ("local", 100), ("local", -1), ("S3", 100)],
    indirect=["job_url"],
)
def test_any_changed_byte_is_found(job, place):
    key = first_data(job)
    data = bytearray(job.store.read(key))
    data[place] ^= 1
    job.store.put(key, bytes(data))
    assert findings(job).faults == [f"{key}: other content than was committed"]


@ANYWHERE
def test_a_missing_object(job):
    key = first_data(job)
    job.store.delete([key])
    assert findings(job).faults == [f"{key}: missing"]


def test_a_cut_object(job):
    key = first_data(job)
    job.store.put(key, job.store.read(key)[:-3])
    assert "committed" in findings(job).faults[0]


def test_a_record_that_counts_wrong(job):
    rewrite_record(job, lambda fields: fields.update(num_ok=1))
    assert "counts other rows" in findings(job).faults[0]


def test_rows_of_another_shard(job):
    other = json.loads(job.store.read(GENERATION.commit_key(1)))
    rewrite_record(job, lambda fields: fields.update(files=other["files"]))
    faults = findings(job).faults
    assert "shard 0: 2 rows missing" in faults
    assert "shard 0: 2 rows extra" in faults


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([0, 0], ["shard 0: 1 rows missing", "shard 0: 1 rows extra"]),
        ([0, 1, 1], ["shard 0: 1 rows extra"]),
        ([1], ["shard 0: 1 rows missing"]),
    ],
)
def test_doubled_and_missing_rows_of_a_record_that_pins_them(job, rows, expected):
    key = first_data(job)
    table = pq.read_table(pa.BufferReader(job.store.read(key)))
    sink = pa.BufferOutputStream()
    pq.write_table(table.take(rows), sink)
    data = sink.getvalue().to_pybytes()
    job.store.put(key, data)
    pinned = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def pin(fields):
        fields["files"][0] |= pinned
        fields.update(num_rows=len(rows), num_ok=len(rows))

    rewrite_record(job, pin)
    found = findings(job)
    assert [fault for fault in found.faults if fault.startswith("shard 0: ")] == expected
    assert (0, 0) in found.broken


@ANYWHERE
def test_foreign_objects(job):
    job.store.put("gen-0000/commit/00000/shard-00000099.json", b"{}")
    assert "not a commit record of this plan" in findings(job).faults[0]
    job.store.delete(["gen-0000/commit/00000/shard-00000099.json"])
    for key in (
        "gen-0000/data/holiday.parquet",
        GENERATION.data_key(0, "a" * 32).replace("data/", "data/x/"),
        "gen-0000/plan/part.parquet",
    ):
        job.store.put(key, b"x")
        (fault,) = findings(job).faults
        assert fault.startswith(f"{key}: foreign object")
        job.store.delete([key])


@ANYWHERE
def test_foreign_pictures(finished):
    key = "png/0000.jpg_color.png"
    stranger = "png/1/intruder_color.png"
    finished.store.put("png/.DS_Store", b"a desktop's")
    # No generation says anything of an error's picture but that it has none.
    for other in (stranger, f"{key}.bak", "png/broken.jpg_color.png"):
        finished.store.put(other, finished.store.read(key))
        assert findings(finished).faults == [f"{other}: foreign object among the PNGs"]
        finished.store.delete([other])
    finished.store.put(stranger, b"x")
    # Others may have been made meanwhile, or not be known without the data.
    finished.store.put(Generation(1).plan_key, b"{}")
    tree = PngTree(finished.store, {})
    assert len(list(tree.foreign())) == 31
    found = Findings(url="")
    _check_tree(tree, 1, found)
    assert found.faults == []
    finished.store.delete([Generation(1).plan_key, first_data(finished)])
    assert findings(finished).faults == [f"{GENERATION.data_key(0, attempt(finished))}: missing"]


def attempt(job):
    return json.loads(job.store.read(GENERATION.commit_key(0)))["attempt"]


def test_pictures_or_a_driver_s_last_word_that_are_missing(finished):
    finished.store.delete([GENERATION.success_key])
    found = findings(finished)
    assert (found.is_sound, found.is_complete) == (True, False)
    assert "sound, unfinished" in found.text()
    assert "no driver has finished it" in found.text()
    pngs = ("png/", GENERATION.png_done_prefix)
    finished.store.delete([item.key for name in pngs for item in finished.store.list(name)])
    found = findings(finished)
    assert (found.is_sound, found.is_complete, found.num_without_pngs) == (True, False, 6)
    assert "the PNGs of 6 shards are not made yet" in found.text()


@pytest.mark.parametrize("moment", ["_records", "_planned", "_check_orphans"])
def test_a_job_that_ends_meanwhile_is_sound(tmp_path, monkeypatch, moment):
    job = make_job(tmp_path)
    job.publish(range(5))
    real = getattr(_Generation, moment)

    def end_first(self, *given):
        # ``_records`` lists before anything is read.
        found = real(self, *given) if moment == "_records" else None
        if not job.store.exists(GENERATION.success_key):
            job.publish([5])
            finish_job(job)
        return found if moment == "_records" else real(self, *given)

    monkeypatch.setattr(_Generation, moment, end_first)
    found = findings(job)
    assert (found.faults, found.broken) == ([], set())
    assert findings(job).is_complete


def test_a_record_that_came_since_is_not_missing(finished, monkeypatch):
    monkeypatch.setattr(_Generation, "_records", lambda _: {})
    found = findings(finished)
    assert found.broken == set()


def test_what_cannot_be_read_is_neither_broken_nor_undecided(finished, monkeypatch):
    keys = {GENERATION.commit_key(1), first_data(finished)}
    read = LocalStore.read

    def fail(self, key):
        if key in keys:
            raise StoreUnavailableError(f"{key}: slow down")
        return read(self, key)

    monkeypatch.setattr(LocalStore, "read", fail)
    found = findings(finished)
    assert (found.broken, found.undecided, found.is_sound) == (set(), {}, False)
    assert {fault.partition(":")[0] for fault in found.unread} >= keys


def test_a_snapshot_that_leaves_out_a_shard(finished):
    plan, store = finished.plan, finished.store
    ranges, table = manifest.best_snapshot(store, GENERATION, plan.plan_id, plan.num_shards)
    store.delete([item.key for item in store.list("manifest/")])
    manifest._write_snapshot(store, GENERATION, plan.plan_id, ranges, table.slice(1))
    (fault,) = findings(finished).faults
    assert "holds other shards than those of its ranges" in fault


@pytest.fixture
def sealed(finished):
    finished.store.delete([GENERATION.success_key])
    return finished


def test_records_are_read_though_they_are_sealed(sealed):
    assert findings(sealed).is_sound
    rewrite_record(sealed, lambda fields: fields.update(num_ok=0))
    assert "not what the sealed manifest says" in findings(sealed).faults[0]
    sealed.store.delete([GENERATION.commit_key(0)])
    assert findings(sealed).faults == [f"{GENERATION.commit_key(0)}: missing"]
    assert findings(sealed).broken == {(0, 0)}


@pytest.mark.parametrize(
    ("key", "data", "named"),
    [
        (GENERATION.commit_key(0), b'{"files": 5}', "malformed"),
        (GENERATION.commit_key(0), b"{", "malformed"),
        ("gen-0000/commit/00000/.DS_Store", b"x", "not a commit record"),
        ("PART", b"cut", "other content than was committed"),
    ],
)
def test_whatever_is_broken_is_named_and_the_rest_is_checked(job, key, data, named):
    job.store.put(job.plan.parts[0].key if key == "PART" else key, data)
    found = findings(job)
    assert any(named in fault for fault in found.faults)
    assert key == "PART" or found.num_rows >= 9


def test_a_record_that_points_elsewhere(job):
    file = {"path": "../../x", "size_bytes": 1, "sha256": "0f" * 32}
    rewrite_record(job, lambda fields: fields.update(files=[file]))
    assert "../../x" in findings(job).faults[0]


def test_a_changed_plan_is_found(job):
    key = job.plan.parts[0].key
    table = pq.read_table(pa.BufferReader(job.store.read(key)))
    sink = pa.BufferOutputStream()
    pq.write_table(table.slice(0, table.num_rows - 1), sink)
    job.store.put(key, sink.getvalue().to_pybytes())
    assert any("another plan" in fault for fault in findings(job).faults)


@ANYWHERE
def test_orphans_are_named_but_no_fault(finished):
    orphans = [GENERATION.data_key(0, "f" * 32), GENERATION.plan_part_key("e" * 32, 0)]
    for orphan in orphans:
        finished.store.put(orphan, b"x")
    found = findings(finished)
    assert found.is_complete
    assert found.orphans == orphans


def test_nothing_to_verify(tmp_path):
    open_store(str(tmp_path / "none"), create=True)
    with pytest.raises(UserError, match="no job here"):
        verify_job(str(tmp_path / "none"), StorageOptions())


def test_status_and_list(tmp_path):
    job = make_job(tmp_path)
    job.publish([0, 5])
    status = job_status(job.store.url, StorageOptions())
    assert (status.state, status.num_done, status.num_shards) == ("interrupted", 2, 6)
    assert (status.num_ok, status.num_quarantined) == (2, 1)
    assert sum(status.quarantined.values()) == 1
    assert status.size_bytes > 0
    assert [found.url for found in find_jobs(str(tmp_path), StorageOptions())] == [job.store.url]
