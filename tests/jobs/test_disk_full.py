"""A full disk stops a job with one line that says so; with room again it goes on to its end."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import jobs.verify  # noqa: F401 - whose ranges are to be small, too
from tests.jobs import crash_points
from tests.jobs.crash_jobs import EXIT_FAILED, KilledJob, Reference, make_reference
from tests.jobs.local_graph import small_ranges

SEED = 20261127
SHARE = 0.2
NUM_STOPS = 5
FULL = "No space left on device"
# What a job of the reference takes besides its weights.
ROOM_BYTES = 160 * 1024


@pytest.fixture(scope="module", autouse=True)
def ranges() -> Iterator[None]:
    with small_ranges():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("small"))


@pytest.fixture
def small_disk(tmp_path: Path, reference: Reference) -> Iterator[Path]:
    """A file system of its own with room for the weights and part of the job."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = reference.weights.stat().st_size + ROOM_BYTES
    arguments = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        subprocess.run(arguments, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a file system here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def stop(job: KilledJob, **more: object) -> None:
    """Run a driver that finds the disk full."""
    kept = job.look.commits() if Path(job.look.url).exists() else {}
    orders = replace(job.again(by_uri=bool(kept)), **more)  # type: ignore[arg-type]
    code, said = crash_points.run(orders), orders.said.read_text()
    assert code == EXIT_FAILED, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("segformer3d: ")
    assert FULL in last
    job.assert_kept(kept)
    assert job.look.unfinished_files() == []


def test_a_disk_that_is_full(small_disk: Path, reference: Reference) -> None:
    job = reference.job(str(small_disk / "out"))
    stop(job)
    num_before = job.look.num_commits()
    assert 0 < num_before < reference.num_shards
    stop(job)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    job.finish(by_uri=True)
    job.assert_as_undisturbed()
    assert job.look.unfinished_files() == []
    print(f"PROOF disk full: stopped at {num_before} of {reference.num_shards} shards, then done")


def test_a_disk_that_is_full_now_and_then(reference: Reference, tmp_path: Path) -> None:
    job = reference.job(str(tmp_path / "out"))
    for number in range(NUM_STOPS):
        stop(job, disk_full=(SHARE, SEED + number))
    job.finish(by_uri=True)
    job.assert_as_undisturbed()
    assert job.look.unfinished_files() == []
    print(f"PROOF disk full in 20% of all writes: {NUM_STOPS} stops, final set right")
