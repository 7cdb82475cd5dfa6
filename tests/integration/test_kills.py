"""Drivers killed with SIGKILL at random moments and resumed: the result must not show it."""

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import pytest

from pipeline.sinks.parquet import frame_id
from tests.budget import Share
from tests.integration.jobs_under_test import (
    END_S,
    GENERATION,
    SETTINGS,
    Driver,
    JobUnderTest,
    Row,
    add_bad_inputs,
    make_archive,
    make_weights,
    wait_for,
)

pytestmark = pytest.mark.ray

EXIT_QUARANTINED = 3
SEED = 20261122
SHARE = Share(7)

Phase = Literal["starting", "planning", "connecting", "annotating", "finishing"]
# Once all shards are decided there is nothing left to annotate, so that comes last.
FEW: tuple[Phase, ...] = ("planning", "annotating", "finishing")
FEWER: tuple[Phase, ...] = ("annotating", "finishing")
MANY: tuple[Phase, ...] = (
    *("starting", "planning", "planning", "connecting", "connecting"),
    *("annotating",) * 11,
    *("finishing",) * 4,
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An archive, and what an undisturbed run makes of it.

    Attributes:
        archive: The archive.
        weights: The weights.
        rows: What the job's rows say.
        pngs: Digests of its PNG tree.
        num_shards: Shards of its plan.
        bad: Frame index and kind of error of what cannot be read, by asset.
    """

    archive: Path
    weights: Path
    rows: list[Row]
    pngs: dict[str, str]
    num_shards: int
    bad: dict[str, tuple[int, str]]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When and how one driver dies.

    Attributes:
        phase: What it shall be doing.
        share: In ``annotating``, the share of its shards that it may decide before.
        lateness: How late in the phase, from 0 to 1.
        whole_group: Whether Ray's daemons are killed with it.
    """

    phase: Phase
    share: float
    lateness: float
    whole_group: bool


def make_reference(folder: Path, *, num_frames: int, num_stills: int) -> Reference:
    archive = make_archive(folder / "archive", num_frames=num_frames, num_stills=num_stills)
    bad = add_bad_inputs(archive)
    weights = make_weights(folder / "weights.safetensors")
    job = job_of(archive, weights, str(folder / "undisturbed"), folder / "said")
    with job.nothing_left():
        driver = job.run()
        assert driver.end() == EXIT_QUARANTINED, driver.said
        job.check_sound()
        plan = job.plan()
        assert plan is not None
        assert driver.result()["num_computed"] == plan.num_shards
        return Reference(
            archive=archive,
            weights=weights,
            rows=job.rows(),
            pngs=job.pngs(),
            num_shards=plan.num_shards,
            bad=bad,
        )


def job_of(archive: Path, weights: Path, url: str, said: Path) -> JobUnderTest:
    return JobUnderTest(
        archive=str(archive),
        url=url,
        weights=weights,
        folder=said,
        settings=(*SETTINGS, "output.png=true"),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("small"), num_frames=30, num_stills=16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("large"), num_frames=80, num_stills=96)


def test_undisturbed_run_annotates_all_that_is_good_and_types_what_is_not(small: Reference) -> None:
    num_good = 2 * 30 + 16
    frame_ids = [row[0] for row in small.rows]
    assert len(set(frame_ids)) == len(frame_ids) == num_good + len(small.bad)
    good = [row for row in small.rows if row[1] == "ok"]
    assert len(good) == num_good
    assert all(row[3] and row[4] for row in good)
    bad = {row[0]: row for row in small.rows if row[1] != "ok"}
    for asset, (frame_index, kind) in small.bad.items():
        assert bad[frame_id(asset, frame_index)][1:] == ("error", kind, None, None), asset
    assert len(small.pngs) == 3 * num_good


def test_three_kills_on_a_folder(small: Reference, tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    survive(small, url, tmp_path / "said", FEW, random.Random(SEED))


def test_two_kills_on_s3(small: Reference, s3_bucket_url: str, tmp_path: Path) -> None:
    survive(small, s3_bucket_url, tmp_path / "said", FEWER, random.Random(SEED + 1))


@pytest.mark.slow
@pytest.mark.timeout(SHARE.timeout_s)
def test_twenty_kills_on_a_folder(large: Reference, tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    survive(large, url, tmp_path / "said", MANY, random.Random(SEED + 2))


@pytest.mark.slow
@pytest.mark.timeout(SHARE.timeout_s)
def test_twenty_kills_on_s3(large: Reference, s3_server: str, tmp_path: Path) -> None:
    url = f"s3://out/{uuid4().hex}"
    survive(large, url, tmp_path / "said", MANY, random.Random(SEED + 3))


def survive(
    reference: Reference, url: str, said: Path, phases: tuple[Phase, ...], rng: random.Random
) -> None:
    """Kill a job's drivers in these phases, resume it each time, and compare the end."""
    job = job_of(reference.archive, reference.weights, url, said)
    with job.nothing_left():
        kills = plan_kills(phases, rng)
        numbers = SHARE.rounds(len(kills)) if phases == MANY else range(len(kills))
        for number in numbers:
            kill = kills[number]
            kept = job.commits()
            driver = start_again(job, rng)
            wait_for_moment(job, driver, kill, len(kept), reference.num_shards)
            landed = strike(job, driver, kill, len(kept), reference.num_shards)
            idle_s = job.wait_until_idle()
            what = "the group" if kill.whole_group else "the driver"
            print(
                f"kill {number + 1}: {what} while {landed}, {len(kept)} -> {job.num_commits()} of "
                f"{reference.num_shards} shards, nobody at work after {idle_s:.1f} s"
            )
            assert_kept(job, kept)
        kept = job.commits()
        driver = start_again(job, rng)
        assert driver.end() == EXIT_QUARANTINED, driver.said
        assert_kept(job, kept)
        assert driver.result()["num_computed"] == reference.num_shards - len(kept)
        job.check_sound()
        assert job.rows() == reference.rows
        assert job.pngs() == reference.pngs
        assert job.exists(GENERATION.success_key)
        assert job.unfinished_files() == []
        job.wait_until_gone()
    where = "S3" if url.startswith("s3:") else "a folder"
    print(
        f"PROOF kills of a driver with Ray, {where}: {number + 1} of {len(kills)} kills, "
        f"{len(reference.rows)} rows and {len(reference.pngs)} PNGs as undisturbed"
    )


def plan_kills(phases: tuple[Phase, ...], rng: random.Random) -> list[Kill]:
    left = phases.count("annotating")
    kills = []
    for phase in phases:
        kill = Kill(
            phase=phase,
            # So much that there is still something to do for those who come after.
            share=rng.uniform(0.2, 1.2) / (left + 1) if phase == "annotating" else 0,
            lateness=rng.random(),
            whole_group=rng.random() < 0.3,
        )
        left -= phase == "annotating"
        kills.append(kill)
    return kills


def start_again(job: JobUnderTest, rng: random.Random) -> Driver:
    """By ``run`` with the same settings, or by ``resume``, which needs no more than the URI."""
    return job.resume() if job.exists("job.json") and rng.random() < 0.5 else job.run()


def wait_for_moment(
    job: JobUnderTest, driver: Driver, kill: Kill, num_before: int, num_shards: int
) -> None:
    """Wait for the sign that the phase has come, and then as long as the kill says."""
    enough = num_before + max(1, round(kill.share * (num_shards - num_before)))
    longest_s = {
        "starting": 0.4,
        "planning": 0.3,
        "connecting": 3.0,
        "annotating": 0.2,
        "finishing": 0.6 if num_before < num_shards else 4.0 if job.lacks_pngs() else 0.2,
    }[kill.phase]
    wait_for(
        lambda: not driver.is_alive or _has_come(job, driver, kill.phase, enough, num_shards),
        END_S,
        lambda: driver.said,
    )
    time.sleep(kill.lateness * longest_s)


def _has_come(
    job: JobUnderTest, driver: Driver, phase: Phase, enough: int, num_shards: int
) -> bool:
    if phase == "starting":
        return True
    if not job.is_beating(driver.process.pid):
        return False
    if phase == "planning":
        return True
    if phase == "connecting":
        return job.plan() is not None
    return job.num_commits() >= (num_shards if phase == "finishing" else enough)


def strike(
    job: JobUnderTest, driver: Driver, kill: Kill, num_before: int, num_shards: int
) -> Phase | Literal["ended"]:
    """Kill it, and say what it was doing then by what it left."""
    if kill.phase == "finishing" and num_before == num_shards and not driver.is_alive:
        assert driver.end() == EXIT_QUARANTINED, driver.said
        return "ended"
    assert driver.is_alive, f"the kill while {kill.phase} came too late: {driver.said}"
    (driver.send_group if kill.whole_group else driver.send)(signal.SIGKILL)
    assert driver.end() == -signal.SIGKILL
    assert "Traceback" not in driver.said, driver.said
    landed = landed_in(job, num_before, num_shards)
    # What comes before Ray is over in a moment.
    assert landed == kill.phase or (kill.phase, landed) in {
        ("starting", "planning"),
        ("planning", "connecting"),
    }
    return landed


def landed_in(job: JobUnderTest, num_before: int, num_shards: int) -> Phase:
    if not job.exists("job.json"):
        return "starting"
    if job.plan() is None:
        return "planning"
    num_now = job.num_commits()
    if num_now == num_shards:
        return "finishing"
    return "connecting" if num_now == num_before else "annotating"


def assert_kept(job: JobUnderTest, kept: dict[str, bytes]) -> None:
    """What was committed stands byte for byte, so nobody decided it again."""
    now = job.commits()
    assert {key: now.get(key) for key in kept} == kept
