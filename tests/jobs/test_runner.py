"""What a run checks before it starts Ray."""

import dataclasses
import signal
import subprocess
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.claim import claim_job, load_weights, reopen_job
from jobs.dry_run import dry_run
from jobs.lease import (
    Heartbeat,
    Pulse,
    beat,
    heartbeats,
    is_cancelled,
    request_cancel,
    take_lease,
)
from jobs.manifest import Manifest
from jobs.planner import Planner
from jobs.runner import _Driver, pending_parts
from jobs.spec import check_spec
from pipeline import graph
from pipeline.errors import (
    ConflictError,
    JobError,
    ObjectForbiddenError,
    StoreUnavailableError,
    UserError,
)
from pipeline.layout import Generation, heartbeat_key
from pipeline.records import canonical_json
from pipeline.storage import StorageOptions, open_store
from segformer3d.weights import model_from_bytes, untrained_weights, weights_to_bytes
from tests.jobs.job_parts import TINY, make_job, tiny_weights


@pytest.fixture
def spec(tmp_path):
    archive = make_job(tmp_path / "other").spec.input.url
    weights = tmp_path / "tiny.safetensors"
    weights.write_bytes(tiny_weights())
    fields = {
        "input": {"url": archive},
        "output": {"url": str(tmp_path / "job")},
        "model": {"weights": str(weights)},
    }
    return check_spec(fields, "the job")


def test_a_job_holds_its_own_weights(spec, tmp_path):
    job = claim_job(spec)
    (tmp_path / "tiny.safetensors").unlink()
    again = reopen_job(job.store.url, StorageOptions())
    assert again.record == job.record
    assert again.store.read(again.record.weights_key) == tiny_weights()


def test_the_weights_decide_the_size_of_frames(spec, tmp_path):
    model, info = model_from_bytes(tiny_weights())
    sized = weights_to_bytes(model, dataclasses.replace(info, short_side_px=96))
    (tmp_path / "tiny.safetensors").write_bytes(sized)
    job = claim_job(spec)
    assert job.record.identity["geometry.short_side_px"] == 96
    list((planner := Planner(job.spec)).shards())
    again = reopen_job(job.store.url, StorageOptions())
    assert again.plan().plan_id == planner.plan().plan_id == dry_run(spec).plan.plan_id
    assert claim_job(spec).record == job.record
    parts = again.store.read(again.plan().parts[0].key)
    sides = pq.read_table(pa.BufferReader(parts)).to_pylist()
    # 32 is the size of what cannot be read.
    assert {min(row["input_width_px"], row["input_height_px"]) for row in sides} == {32, 96}


def test_weights_that_were_never_left_there_are_fetched_again(spec):
    job = claim_job(spec)
    job.store.delete([job.record.weights_key])
    assert reopen_job(job.store.url, StorageOptions()).store.exists(job.record.weights_key)


@pytest.mark.parametrize("left", [True, False])
def test_other_weights_stop_a_resume(spec, tmp_path, left):
    job = claim_job(spec)
    (tmp_path / "tiny.safetensors").write_bytes(untrained_weights(TINY, seed=1))
    if left:
        job.store.put(job.record.weights_key, b"changed")
    else:
        job.store.delete([job.record.weights_key])
    with pytest.raises(JobError, match="not the weights file"):
        reopen_job(job.store.url, StorageOptions())


def test_weights_by_s3_url(spec, s3_bucket_url):
    open_store(s3_bucket_url).put("w.safetensors", b"data")
    url = f"{s3_bucket_url}/w.safetensors"
    asked = spec.model_copy(update={"model": spec.model.model_copy(update={"weights": url})})
    assert load_weights(asked) == b"data"
    url = f"{s3_bucket_url}/none.safetensors"
    asked = spec.model_copy(update={"model": spec.model.model_copy(update={"weights": url})})
    with pytest.raises(UserError, match=r"none\.safetensors"):
        load_weights(asked)


def test_a_job_with_other_outputs_is_not_resumed(spec):
    job = claim_job(spec)
    other = dataclasses.replace(job.record, output_version=99)
    job.store.put("job.json", other.to_json())
    with pytest.raises(ConflictError, match="output_version 99 there"):
        reopen_job(job.store.url, StorageOptions())


def test_unreadable_signs_of_life_are_no_news(tmp_path):
    store = open_store(str(tmp_path / "job"), create=True)
    for name in ("lease-foo.json", "heartbeat-x.json", "heartbeat-00000007.json"):
        store.put(f"lease/{name}", b"{}")
    assert heartbeats(store) == []
    assert take_lease(store) == 1


def test_leases_count_up_and_say_who_lives(tmp_path):
    store = open_store(str(tmp_path / "job"), create=True)
    assert [take_lease(store) for _ in range(3)] == [1, 2, 3]
    beat(store, Heartbeat.now(1, "ended"))
    beat(
        store,
        dataclasses.replace(
            Heartbeat.now(2, "running"), host="elsewhere", at="2020-01-01T00:00:00+00:00"
        ),
    )
    assert [found.is_alive for found in heartbeats(store)] == [False, False, True]
    assert [found.lease for found in request_cancel(store)] == [3]


def test_a_pulse_ends_with_a_word(tmp_path):
    store = open_store(str(tmp_path / "job"), create=True)
    lease = take_lease(store)
    with Pulse(store, lease, lambda: {"state": "running", "num_done": 4}):
        pass
    (last,) = heartbeats(store)
    assert (last.state, last.num_done) == ("ended", 4)


@pytest.mark.parametrize(
    ("said", "message"),
    [("pinned", "other content than was committed"), ("by an old plan", "cannot be read: ")],
)
def test_a_damaged_plan_stops_the_run_and_is_named(tmp_path, said, message):
    job = make_job(tmp_path)
    plan = job.plan
    manifest = Manifest.load(job.store, Generation(), plan.plan_id, plan.num_shards)
    (part,) = pending_parts(plan, manifest, backwards=False)
    if said == "by an old plan":
        part = dataclasses.replace(part, sha256=None)
    read_plan = graph._ReadPlan(job.context())
    table = pa.Table.from_pylist([dataclasses.asdict(part)])
    assert read_plan(table)["shard_id"].to_pylist() == list(part.shard_ids)
    data = bytearray(job.store.read(part.key))
    data[-20] ^= 0xFF
    job.store.put(part.key, bytes(data))
    with pytest.raises(JobError, match=f"{part.key}: {message}.*; see `segformer3d verify`"):
        read_plan(table)


def test_the_stages_write_where_the_driver_looks(spec, s3_server, s3_bucket_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    url = f"{s3_bucket_url}/job"
    asked = spec.model_copy(update={"output": spec.output.model_copy(update={"url": url})})
    claim_job(asked)
    # The environment, like job.json, speaks of another server than the one that is named now.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    job = reopen_job(url, StorageOptions(endpoint_url=s3_server))
    plan = job.plan()
    context = _Driver(job, 1)._context(plan)
    assert context.job_storage.endpoint_url == s3_server
    assert context.store().exists("job.json")
    assert context.archive_storage.endpoint_url == "http://127.0.0.1:9"


def test_a_wrong_input_claims_nothing(spec, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.jpg").touch()
    (tmp_path / "empty" / "notes.txt").touch()
    wrong = spec.input.model_copy(update={"url": str(tmp_path / "empty")})
    with pytest.raises(UserError, match="no image, video or tar here"):
        claim_job(spec.model_copy(update={"input": wrong}))
    nothing = spec.input.model_copy(update={"exclude": ("**",)})
    with pytest.raises(UserError, match="no image, video or tar here"):
        claim_job(spec.model_copy(update={"input": nothing}))
    assert list((tmp_path / "job").iterdir()) == []
    # The right one finds the output free.
    claim_job(spec)


def test_the_first_ctrl_c_is_not_lost_on_a_store_that_fails(spec, monkeypatch, capsys):
    monkeypatch.setattr("jobs.runner.HEARTBEAT_S", 0.01)
    driver = _Driver(claim_job(spec), None)
    driver.state = "running"
    put, failures = driver.store.put, iter([True] * 3)

    def fail(key, data):
        if "cancel" in key and next(failures, False):
            raise StoreUnavailableError("s3://b: SlowDown https://h/x?X-Amz-Signature=SECRET")
        put(key, data)

    monkeypatch.setattr(driver.store, "put", fail)
    driver._on_signal(signal.SIGINT, None)
    (thread,) = (item for item in threading.enumerate() if item.name == "cancel")
    thread.join(10)
    assert is_cancelled(driver.store, driver.lease)
    said = capsys.readouterr().err
    assert said.count("SlowDown") == 1
    assert "SECRET" not in said


def test_who_drains_no_more_lets_the_store_be(spec, monkeypatch):
    monkeypatch.setattr("jobs.runner.HEARTBEAT_S", 600.0)
    driver = _Driver(claim_job(spec), None)
    driver.state = "running"

    def fail(*_):
        raise StoreUnavailableError("never again")

    with driver.signals():
        monkeypatch.setattr(driver.store, "put", fail)
        driver._on_signal(signal.SIGINT, None)
        (thread,) = (item for item in threading.enumerate() if item.name == "cancel")
    thread.join(10)
    assert not thread.is_alive()


def test_a_process_of_a_machine_of_the_same_name_is_not_missed_here(tmp_path):
    store = open_store(str(tmp_path / "job"), create=True)
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    mine = dataclasses.replace(Heartbeat.now(1, "running"), pid=gone.pid)
    assert mine.pids
    for lease, pids in enumerate((mine.pids, "another:4026531836", ""), start=1):
        beat(store, dataclasses.replace(mine, lease=lease, pids=pids))
    # As an older version writes it.
    key = heartbeat_key(4)
    old = dataclasses.asdict(mine) | {"lease": 4}
    del old["pids"]
    store.put(key, canonical_json(old))
    assert [item.is_alive for item in heartbeats(store)] == [False, True, False, False]


def test_who_may_not_write_to_a_job_is_told_so_as_a_user(tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "job"), create=True)

    def refuse(*_):
        raise ObjectForbiddenError("permission denied")

    monkeypatch.setattr(store, "create", refuse)
    monkeypatch.setattr("pipeline.storage.commit._pause", lambda _: None)
    with pytest.raises(ObjectForbiddenError, match=r"^permission denied$"):
        take_lease(store)
