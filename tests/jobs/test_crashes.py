"""Drivers that die by SIGKILL at every step that changes storage: the result must not show it."""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

import jobs.verify  # noqa: F401 - whose ranges are to be small, too
from tests.budget import Share, never
from tests.jobs import crash_points
from tests.jobs.crash_jobs import (
    CONTESTED,
    EXIT_QUARANTINED,
    FRESH,
    KILLED,
    REPAIRED,
    RESUMED,
    SCENARIOS,
    TROUBLED,
    KilledJob,
    Reference,
    Scenario,
    crash_at_each,
    crash_in_turn,
    make_reference,
    make_wrecked_reference,
)
from tests.jobs.crash_points import (
    AFTER,
    BEFORE,
    KINDS,
    LINKED,
    UNLINKED,
    UNRENAMED,
    UNSYNCED,
    Point,
)
from tests.jobs.local_graph import small_ranges

SEED = 20261125
NUM_KILLS = 1000
LOCAL_SHARE, S3_SHARE, KILLS_SHARE = Share(4), Share(5), Share(10)
# In the order in which a job comes to them, and each in reach of a driver that goes on after the
# one before.
LABELS = (
    *("create probe", "delete probe", "create job", "put weights", "create lease"),
    *("put heartbeat", "put plan part", "create plan", "put data", "create commit record"),
    *("put png", "put png marker", "put snapshot", "create success"),
)
LOSERS = ("delete plan part", "delete data")
TROUBLES = ("put death", "put cancel marker")
# Of a repair, and of what it collects in the end.
REPAIRS = (
    *("delete snapshot", "create lease", "put heartbeat", "put plan part", "create plan"),
    *("put data", "create commit record", "put png", "put png marker", "delete png"),
    *("put snapshot", "delete data", "delete plan part", "create success"),
)
PICTURES = ("put png", "delete png")


@pytest.fixture(scope="module", autouse=True)
def ranges() -> Iterator[None]:
    with small_ranges():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def wrecked(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_wrecked_reference(tmp_path_factory.mktemp("wrecked"))


@pytest.fixture
def s3_environment(s3_server: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def test_the_labels_are_all_there_are(
    reference: Reference, wrecked: Reference, tmp_path: Path
) -> None:
    fresh = FRESH.points(reference.job(str(tmp_path / "fresh")))
    assert tuple(dict.fromkeys(point.label for point in fresh)) == LABELS
    contested = CONTESTED.points(reference.job(str(tmp_path / "contested")))
    new = dict.fromkeys(point.label for point in contested if point.label not in LABELS)
    assert tuple(new) == LOSERS
    troubled = TROUBLED.points(reference.job(str(tmp_path / "troubled")))
    assert tuple(dict.fromkeys(point.label for point in troubled)) == TROUBLES
    job = wrecked.job(str(tmp_path / "wrecked"))
    REPAIRED.prepare(job)
    repaired = REPAIRED.points(job)
    assert tuple(dict.fromkeys(point.label for point in repaired)) == REPAIRS
    labels = {*LABELS, *LOSERS, *TROUBLES, *REPAIRS}
    assert {label.partition(" ")[2] for label in labels} == {kind for _, kind in KINDS}
    steps = Counter(point.step for point in fresh if point.label == "create commit record")
    assert steps == dict.fromkeys((BEFORE, UNSYNCED, UNLINKED, LINKED, AFTER), reference.num_shards)


@pytest.mark.parametrize("step", [BEFORE, AFTER])
def test_a_death_at_each_kind_of_write(reference: Reference, tmp_path: Path, step: str) -> None:
    points = [Point(label, 1, step) for label in LABELS]
    crash_in_turn(reference.job(str(tmp_path / "out")), FRESH, points)
    print(f"PROOF crash points, one a label, {step}: {len(points)} deaths in one local job")


@pytest.mark.parametrize("step", [BEFORE, AFTER])
@pytest.mark.parametrize(
    ("scenario", "labels"),
    [(CONTESTED, LOSERS), (TROUBLED, TROUBLES)],
    ids=["lost a race", "lost a process, and interrupted"],
)
def test_a_death_at_each_kind_of_write_in_trouble(
    reference: Reference, tmp_path: Path, scenario: Scenario, labels: tuple[str, ...], step: str
) -> None:
    points = [Point(label, 1, step) for label in labels]
    crash_in_turn(reference.job(str(tmp_path / "out")), scenario, points)


@pytest.mark.parametrize("step", [BEFORE, AFTER])
def test_a_death_in_a_repair(wrecked: Reference, tmp_path: Path, step: str) -> None:
    # Who seals and collects has made all pictures before: a job of its own for these.
    others = tuple(label for label in REPAIRS if label not in PICTURES)
    for labels in (others, PICTURES):
        job = wrecked.job(str(tmp_path / labels[0]))
        REPAIRED.prepare(job)
        crash_in_turn(job, REPAIRED, [Point(label, 1, step) for label in labels])
    print(f"PROOF crash points, one a label, {step}: {len(REPAIRS)} deaths in two local repairs")


def test_a_death_within_a_local_write(reference: Reference, tmp_path: Path) -> None:
    inner = (UNSYNCED, UNLINKED, LINKED)
    points = [Point("create plan", 1, step) for step in inner]
    points += [Point("put heartbeat", 1, UNRENAMED)]
    points += [Point("create commit record", 1, step) for step in inner]
    job = reference.job(str(tmp_path / "out"))
    crash_in_turn(job, FRESH, points)


def test_a_death_while_collecting(reference: Reference, tmp_path: Path) -> None:
    job = reference.job(str(tmp_path / "out"))
    RESUMED.prepare(job)
    # Data goes first, so it must be gone before the parts come.
    points = [Point(label, 1, step) for label in LOSERS[::-1] for step in (BEFORE, AFTER)]
    crash_in_turn(job, RESUMED, points)


def test_deaths_on_s3(
    reference: Reference, s3_bucket_url: str, s3_environment: dict[str, str]
) -> None:
    job = reference.job(s3_bucket_url, s3_environment)
    labels = ("create job", "create plan", "create commit record", "put png marker")
    points = [Point(label, 1, AFTER) for label in labels]
    points += [Point("put snapshot", 1, BEFORE), Point("create success", 1, AFTER)]
    crash_in_turn(job, FRESH, points)


@pytest.mark.slow
@pytest.mark.timeout(LOCAL_SHARE.timeout_s)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_death_at_every_point_on_a_folder(
    reference: Reference, tmp_path: Path, scenario: Scenario
) -> None:
    done = crash_at_each(
        scenario, reference, lambda: str(tmp_path / uuid4().hex), share=LOCAL_SHARE
    )
    _say("local", scenario, *done)


@pytest.mark.slow
@pytest.mark.timeout(LOCAL_SHARE.timeout_s)
def test_a_death_at_every_point_of_a_repair(wrecked: Reference, tmp_path: Path) -> None:
    done = crash_at_each(REPAIRED, wrecked, lambda: str(tmp_path / uuid4().hex), share=LOCAL_SHARE)
    _say("local", REPAIRED, *done)


@pytest.mark.slow
@pytest.mark.timeout(S3_SHARE.timeout_s)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_death_at_every_point_on_s3(
    reference: Reference, s3_environment: dict[str, str], scenario: Scenario
) -> None:
    done = crash_at_each(
        scenario, reference, lambda: f"s3://out/{uuid4().hex}", s3_environment, share=S3_SHARE
    )
    _say("S3", scenario, *done)


def _say(where: str, scenario: Scenario, points: list[Point], num_points: int) -> None:
    labels = {point.label for point in points}
    steps = {point.step for point in points}
    print(
        f"PROOF crash points, {where}, {scenario.name} job: {len(points)} of {num_points} points, "
        f"{len(labels)} labels, {len(steps)} steps; every final set equals the undisturbed run's"
    )


def test_a_few_random_kills(reference: Reference, tmp_path: Path) -> None:
    _kill_at_random(reference, tmp_path, 8, random.Random(SEED))


@pytest.mark.slow
@pytest.mark.timeout(KILLS_SHARE.timeout_s)
def test_random_kills(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    large = make_reference(tmp_path_factory.mktemp("large"), num_frames=16, num_stills=8)
    _kill_at_random(large, tmp_path, NUM_KILLS, random.Random(SEED + 1), KILLS_SHARE.clock())


def _kill_at_random(
    reference: Reference,
    folder: Path,
    num_kills: int,
    rng: random.Random,
    is_over: Callable[[], bool] = never,
) -> None:
    """Kill drivers at random times, as many jobs as it takes, each resumed until it is done."""
    whole_s = _duration_s(reference.job(str(folder / "undisturbed")))
    landed: Counter[str] = Counter()
    num_jobs = 0
    while landed.total() < num_kills and not is_over():
        job = reference.job(str(folder / f"job-{num_jobs}"))
        num_jobs += 1
        # The longer a job has lived, the less is left of it.
        for _ in range(min(rng.randint(1, 12), num_kills - landed.total())):
            kept = job.look.commits()
            if not _strike(job, rng, rng.uniform(0.1, 1) * whole_s):
                break
            landed[_phase(job, len(kept), reference.num_shards)] += 1
            job.assert_kept(kept)
        job.finish(by_uri=rng.random() < 0.5)
        job.assert_as_undisturbed()
    shares = ", ".join(f"{count} {phase}" for phase, count in landed.most_common())
    print(
        f"PROOF random SIGKILLs of the driver: {landed.total()} of {num_kills} over "
        f"{num_jobs} jobs ({shares}), every final set right"
    )


def _duration_s(job: KilledJob) -> float:
    started = time.monotonic()
    job.finish()
    return time.monotonic() - started


def _strike(job: KilledJob, rng: random.Random, after_s: float) -> bool:
    """Start a driver and kill it after a while; False if it was done before that."""
    process = crash_points.start(job.again(by_uri=rng.random() < 0.5))
    process.join(after_s)
    process.kill()
    process.join()
    assert process.exitcode in {KILLED, EXIT_QUARANTINED}
    return process.exitcode == KILLED


def _phase(job: KilledJob, num_before: int, num_shards: int) -> str:
    if not job.look.exists("job.json"):
        return "starting"
    if job.look.plan() is None:
        return "planning"
    num_now = job.look.num_commits()
    if num_now == num_shards:
        return "finishing"
    return "resuming" if num_now == num_before else "annotating"
