"""Several drivers on one job, at a time and one after the other."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.jobs_under_test import (
    STAGED,
    JobUnderTest,
    make_archive,
    make_weights,
    wait_for,
)

pytestmark = pytest.mark.ray

EXIT_DONE = 0
NOT_MUCH_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drivers")


@pytest.fixture(scope="module")
def job(folder: Path) -> Iterator[JobUnderTest]:
    job = JobUnderTest(
        archive=str(make_archive(folder / "archive", num_frames=50, num_stills=60)),
        url=str(folder / "out"),
        weights=make_weights(folder / "weights.safetensors"),
        folder=folder / "said",
        settings=(*STAGED, "ray.num_cpus=1"),
    )
    with job.nothing_left():
        yield job


def test_two_drivers_share_a_job_and_a_third_finds_it_done(job: JobUnderTest) -> None:
    first = job.run()
    wait_for(lambda: job.is_beating(first.process.pid), 60, lambda: first.said)
    second = job.run()
    assert first.end() == EXIT_DONE, first.said
    assert second.end() == EXIT_DONE, second.said
    assert f"Another driver works on this job (process {first.process.pid} on" in second.said
    plan = job.plan()
    assert plan is not None
    computed = [driver.result()["num_computed"] for driver in (first, second)]
    print(f"{plan.num_shards} shards: {computed[0]} by the first, {computed[1]} by the second")
    assert sum(computed) == plan.num_shards
    job.wait_until_idle()
    job.check_sound()
    frame_ids = [row[0] for row in job.rows()]
    assert len(set(frame_ids)) == len(frame_ids) == plan.num_frames

    objects = job.objects()
    started = time.monotonic()
    third = job.run()
    assert third.end() == EXIT_DONE, third.said
    assert time.monotonic() - started < NOT_MUCH_S
    result = third.result()
    assert (result["outcome"], result["num_computed"]) == ("done", 0)
    assert job.objects() == objects
    job.wait_until_gone()
