"""Signals as terminals and service managers send them: drain or stop, and the job stays resumable.

The tests share one unfinished job, each takes it a few shards further; the last one finishes it.
"""

import signal
import time
from collections.abc import Iterator

import pytest

from tests.integration.jobs_under_test import (
    END_S,
    SETTINGS,
    Driver,
    JobUnderTest,
    make_archive,
    make_weights,
    wait_for,
)

pytestmark = pytest.mark.ray

EXIT_DONE, EXIT_INTERRUPTED = 0, 130
DRAIN_S = 45.0
AT_ONCE_S = 15.0


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobUnderTest]:
    folder = tmp_path_factory.mktemp("signals")
    job = JobUnderTest(
        # A drain takes a second or two, in which twenty shards each are done.
        archive=str(make_archive(folder / "archive", num_frames=100, num_stills=400)),
        url=str(folder / "out"),
        weights=make_weights(folder / "weights.safetensors"),
        folder=folder / "said",
        settings=SETTINGS,
    )
    with job.nothing_left():
        yield job


def test_sigint_to_the_foreground_group_drains(job: JobUnderTest) -> None:
    driver = start_in_the_middle(job)
    num_before = job.num_commits()
    driver.send_group(signal.SIGINT)
    assert_drained(job, driver, num_before)


def test_sigterm_to_the_driver_drains(job: JobUnderTest) -> None:
    driver = start_in_the_middle(job)
    num_before = job.num_commits()
    driver.send(signal.SIGTERM)
    assert_drained(job, driver, num_before)


def test_second_sigint_stops_at_once(job: JobUnderTest) -> None:
    driver = start_in_the_middle(job)
    driver.send_group(signal.SIGINT)
    wait_for(lambda: "once more stops at once" in driver.said, AT_ONCE_S)
    driver.send_group(signal.SIGINT)
    assert driver.end(AT_ONCE_S) == EXIT_INTERRUPTED
    assert "Traceback" not in driver.said
    assert "segformer3d resume" in driver.said
    job.wait_until_idle()


def test_sigterm_to_the_group_ends_the_driver_although_ray_is_gone(job: JobUnderTest) -> None:
    driver = start_in_the_middle(job)
    driver.send_group(signal.SIGTERM)
    started = time.monotonic()
    assert driver.end(DRAIN_S) not in {EXIT_DONE, None}
    print(f"ended with {driver.process.returncode} after {time.monotonic() - started:.1f} s")
    assert time.monotonic() - started < AT_ONCE_S
    assert "Traceback" not in driver.said, driver.said
    assert "resume" in driver.said
    job.wait_until_idle()


def test_after_all_signals_a_resume_completes_the_job(job: JobUnderTest) -> None:
    kept = job.commits()
    driver = job.resume() if kept else job.run()
    assert driver.end() == EXIT_DONE, driver.said
    plan = job.plan()
    assert plan is not None
    result = driver.result()
    assert (result["outcome"], result["num_done"]) == ("done", plan.num_shards)
    assert result["num_computed"] == plan.num_shards - len(kept)
    now = job.commits()
    assert {key: now[key] for key in kept} == kept
    job.check_sound()
    job.wait_until_gone()


def start_in_the_middle(job: JobUnderTest) -> Driver:
    """A driver that has committed a few shards in this run and has many to go."""
    enough = job.num_commits() + 2
    driver = job.resume() if job.exists("job.json") else job.run()
    wait_for(lambda: job.num_commits() >= enough or not driver.is_alive, END_S, lambda: driver.said)
    assert driver.is_alive, driver.said
    plan = job.plan()
    assert plan is not None
    assert job.num_commits() < plan.num_shards - 4, "the archive is too small for this test"
    return driver


def assert_drained(job: JobUnderTest, driver: Driver, num_before: int) -> None:
    started = time.monotonic()
    assert driver.end(DRAIN_S) == EXIT_INTERRUPTED, driver.said
    print(f"drained in {time.monotonic() - started:.1f} s, {num_before} -> {job.num_commits()}")
    assert "Traceback" not in driver.said, driver.said
    assert f"go on with: segformer3d resume {job.url}" in driver.said
    result = driver.result()
    assert result["outcome"] == "interrupted"
    # What was in the model is committed, not thrown away, and nothing half done lies about.
    assert result["num_done"] == job.num_commits() > num_before
    assert result["num_done"] < result["num_shards"]
    job.wait_until_idle()
    findings = job.verify()
    assert (findings.faults, findings.orphans) == ([], [])
