"""Verify finds whatever is missing, doubled, foreign or changed, down to a byte."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.manifest import Manifest
from jobs.status import find_jobs, job_status
from jobs.verify import verify_job
from pipeline.errors import UserError
from pipeline.layout import Generation
from pipeline.storage import StorageOptions, open_store
from tests.jobs.job_parts import make_job

GENERATION = Generation()


@pytest.fixture
def job(tmp_path):
    made = make_job(tmp_path)
    made.publish(range(made.plan.num_shards))
    return made


def findings(job):
    return verify_job(job.store.url, StorageOptions())


def first_data(job):
    return min(item.key for item in job.store.list(GENERATION.data_prefix))


def rewrite_record(job, change):
    key = GENERATION.commit_key(0)
    fields = json.loads(job.store.read(key))
    change(fields)
    job.store.put(key, json.dumps(fields).encode())


def test_a_whole_job_is_sound_and_complete(job):
    found = findings(job)
    assert found.is_complete
    assert (found.num_rows, found.num_frames, found.num_decided) == (11, 11, 6)


def test_an_unfinished_job_is_sound(tmp_path):
    job = make_job(tmp_path)
    job.publish([0, 1])
    found = findings(job)
    assert found.is_sound
    assert not found.is_complete
    assert found.undecided == {0: [2, 3, 4, 5]}


@pytest.mark.parametrize("place", [0, 100, -1])
def test_any_changed_byte_is_found(job, place):
    key = first_data(job)
    data = bytearray(job.store.read(key))
    data[place] ^= 1
    job.store.put(key, bytes(data))
    assert findings(job).faults == [f"{key}: other content than was committed"]


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


def test_foreign_objects(job):
    job.store.put("gen-0000/commit/00000/shard-00000099.json", b"{}")
    assert "not a commit record of this plan" in findings(job).faults[0]
    job.store.delete(["gen-0000/commit/00000/shard-00000099.json"])
    job.store.put("gen-0000/data/holiday.parquet", b"x")
    assert "foreign" in findings(job).faults[0]


@pytest.fixture
def sealed(job):
    Manifest.load(job.store, GENERATION, job.plan.plan_id, job.plan.num_shards).seal()
    return job


def test_records_are_read_though_they_are_sealed(sealed):
    assert findings(sealed).is_complete
    rewrite_record(sealed, lambda fields: fields.update(num_ok=0))
    assert "not what the sealed manifest says" in findings(sealed).faults[0]
    sealed.store.delete([GENERATION.commit_key(0)])
    assert "not what the sealed manifest says" in findings(sealed).faults[0]


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


def test_orphans_are_named_but_no_fault(job):
    orphan = GENERATION.data_key(0, "f" * 32)
    job.store.put(orphan, b"x")
    found = findings(job)
    assert found.is_complete
    assert found.orphans == [orphan]


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
