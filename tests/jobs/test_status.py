"""Looking for jobs where not everything can be read."""

import os

import pytest

from jobs.status import find_jobs
from pipeline.errors import UserError
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
