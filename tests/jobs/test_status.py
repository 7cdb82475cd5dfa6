"""Looking for jobs where not everything can be read."""

import json
import os
import subprocess
from dataclasses import replace

import pytest

from jobs import cli
from jobs.claim import reopen_job
from jobs.lease import Heartbeat, beat, heartbeat_key, heartbeats
from jobs.runner import _Driver
from jobs.status import find_jobs, job_status
from pipeline.errors import JobError, StorageError, UserError
from pipeline.layout import JOB_KEY
from pipeline.storage import StorageOptions
from tests.jobs.job_parts import make_job


def refuse_folder(monkeypatch, path):
    real = os.scandir

    def scandir(folder):
        if os.fspath(folder) == str(path):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)


def test_links_to_folders_are_not_searched(tmp_path):
    job = make_job(tmp_path / "root", num_images=1, bad=False)
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "root" / "job")
    found = find_jobs(str(tmp_path / "root"), StorageOptions())
    assert [status.url for status in found] == [job.store.url]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"surprise": 1}', b"\xff"])
def test_a_broken_job_does_not_hide_the_others(tmp_path, damage):
    job = make_job(tmp_path / "sound", num_images=1, bad=False)
    for name in ("a", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / JOB_KEY).write_bytes(damage)
    found = find_jobs(str(tmp_path), StorageOptions())
    assert [(status.url, status.state) for status in found] == [
        (str(tmp_path / "a"), "unreadable"),
        (job.store.url, "interrupted"),
        (str(tmp_path / "z"), "unreadable"),
    ]
    broken = found[0]
    assert JOB_KEY in broken.problem
    assert broken.line() == f"{broken.url}  unreadable  {broken.problem}"
    assert broken.text() == f"{broken.url}: unreadable\n{broken.problem}"
    assert "\n" not in broken.problem


def test_an_unreadable_folder_does_not_hide_the_others(tmp_path, monkeypatch):
    job = make_job(tmp_path / "sound", num_images=1, bad=False)
    (tmp_path / "lost").mkdir()
    refuse_folder(monkeypatch, tmp_path / "lost")
    lost, found = find_jobs(str(tmp_path), StorageOptions())
    assert (lost.url, lost.state) == (str(tmp_path / "lost"), "unreadable")
    assert "permission denied" in lost.problem
    assert found.url == job.store.url


def test_an_unreadable_root_is_the_users_mistake(tmp_path, monkeypatch):
    refuse_folder(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="permission denied"):
        find_jobs(str(tmp_path), StorageOptions())


def test_a_small_object_of_forty_gigabytes_is_not_read(tmp_path):
    job = make_job(tmp_path, num_images=1, bad=False)
    beat = tmp_path / "job" / heartbeat_key(9)
    beat.parent.mkdir(exist_ok=True)
    beat.touch()
    for path in (beat, tmp_path / "job" / "gen-0000/plan/plan.json", tmp_path / "job" / JOB_KEY):
        held = path.read_bytes()
        os.truncate(path, 40 << 30)
        if path == beat:
            assert heartbeats(job.store) == []
            continue
        with pytest.raises(StorageError, match=f"{path.name}: 42949672960 bytes, more than the"):
            job_status(job.store.url, StorageOptions())
        (found,) = find_jobs(str(tmp_path / "job"), StorageOptions())
        assert found.state == "unreadable"
        path.write_bytes(held)


@pytest.mark.parametrize(
    ("num_parts", "shards", "message"),
    [(1, 1001, "cannot hold 1001 shards"), (100_001, 1, "100001 parts, more than 100000")],
)
def test_a_plan_of_more_shards_than_its_parts_can_hold(tmp_path, num_parts, shards, message):
    job = make_job(tmp_path, num_images=1, bad=False)
    path = tmp_path / "job" / "gen-0000/plan/plan.json"
    plan = json.loads(path.read_bytes())
    plan["parts"] = [
        {
            "key": f"gen-0000/plan/part-a-{number:05d}.parquet",
            "first_shard": number * shards,
            "num_shards": shards,
        }
        for number in range(num_parts)
    ]
    plan["num_shards"] = num_parts * shards
    path.write_text(json.dumps(plan))
    with pytest.raises(JobError, match=f"plan.json is malformed: .*{message}"):
        job_status(job.store.url, StorageOptions())


def test_folders_nest_deeper_than_calls(tmp_path):
    folder = tmp_path
    for _ in range(1200):
        folder = folder / "d"
        folder.mkdir()
    assert find_jobs(str(tmp_path), StorageOptions()) == []
    # Python's own rmtree, and so pytest, would call itself too often.
    subprocess.run(["/bin/rm", "-r", tmp_path / "d"], check=True)


def test_no_control_character_of_a_stored_object_reaches_the_terminal(tmp_path, capsys):
    job = make_job(tmp_path, num_images=1, bad=False)
    host = "h\x1b]0;owned\x07\x9b2J\nforged"
    beat(job.store, replace(Heartbeat.now(9, "running"), host=host))
    for verb in ("status", "cancel"):
        assert cli.run([verb, job.store.url]) == 0
    _Driver(reopen_job(job.store.url, StorageOptions()), 1)
    (tmp_path / "job" / "odd\x1b[2J").mkdir()
    (tmp_path / "job" / "odd\x1b[2J" / JOB_KEY).touch()
    (tmp_path / "job" / JOB_KEY).unlink()
    assert cli.run(["list", job.store.url]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("owned") == 3
    assert "unreadable" in said
    assert all(line.isprintable() for line in said.split("\n"))
    assert not any(line.startswith("forged") for line in said.split("\n"))
