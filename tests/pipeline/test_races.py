"""Sixteen writers race for one commit: on a local disk, a real S3 server (weed) and moto's."""

import hashlib
import time
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.commit import parse_commit
from pipeline.storage import StorageOptions, Store, open_store
from tests.budget import Share
from tests.racers import GENERATION, PLAN_ID, Report, race

NUM_WRITERS = 16
NUM_FAST_ROUNDS = 4
# Writers of one heat start together, which takes seconds.
NUM_ROUNDS, NUM_HEATS = 1000, 20
SHARE = Share(5)


Place = tuple[str, str, StorageOptions]


@pytest.fixture(params=["local", "weed", "moto"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return "local disk", str(tmp_path / "job"), StorageOptions()
    endpoint_url = request.getfixturevalue(
        "s3_server" if request.param == "weed" else "moto_server"
    )
    return request.param, f"s3://out/{uuid4().hex}", StorageOptions(endpoint_url=endpoint_url)


def check_race(
    place: Place, *, num_processes: int, num_rounds: int, num_lanes: int
) -> tuple[set[str], float]:
    """Race, and look at every round; the writers that won one, and the seconds it took."""
    _, url, options = place
    store = open_store(url, options, create=True)
    started = time.monotonic()
    rounds = race(
        url,
        options,
        num_processes=num_processes,
        num_threads=NUM_WRITERS // num_processes,
        num_rounds=num_rounds,
        num_lanes=num_lanes,
    )
    seconds = time.monotonic() - started
    assert sorted(rounds) == list(range(num_rounds))
    for number, reports in rounds.items():
        check_round(store, number, reports)
    kept = {item.key for item in store.list(GENERATION.data_prefix)}
    assert kept == {
        GENERATION.data_key(number, reports[0].attempt) for number, reports in rounds.items()
    }
    winners = {report.writer for reports in rounds.values() for report in reports if report.won}
    return winners, seconds


def say(where: str, num_processes: int, rounds: str, winners: set[str], seconds: float) -> None:
    print(
        f"PROOF race on {where}: {NUM_WRITERS} writers in "
        f"{num_processes} processes, {rounds} rounds in {seconds:.0f} s, one winner each, "
        f"{len(winners)} writers won at least once, no loser's data left"
    )


def check_round(store: Store, number: int, reports: list[Report]) -> None:
    assert len({report.writer for report in reports}) == len(reports) == NUM_WRITERS
    (winner,) = [report for report in reports if report.won]
    assert {report.attempt for report in reports} == {winner.attempt}
    record = parse_commit(store.read(GENERATION.commit_key(number)), PLAN_ID, number)
    assert record.attempt == winner.attempt
    data = f"round {number} by {winner.writer}".encode()
    assert store.read(GENERATION.data_key(number, winner.attempt)) == data
    assert record.files[0].sha256 == hashlib.sha256(data).hexdigest()


def test_sixteen_writers_have_one_winner(place: Place) -> None:
    winners, seconds = check_race(place, num_processes=2, num_rounds=NUM_FAST_ROUNDS, num_lanes=4)
    say(place[0], 2, f"{NUM_FAST_ROUNDS}", winners, seconds)


@pytest.mark.slow
@pytest.mark.timeout(SHARE.timeout_s)
def test_a_thousand_races_have_one_winner_each(place: Place) -> None:
    where, url, options = place
    all_winners: set[str] = set()
    all_seconds = 0.0
    num_rounds = 0
    for heat in SHARE.rounds(NUM_HEATS):
        winners, seconds = check_race(
            (where, f"{url}/{heat}", options),
            num_processes=16,
            num_rounds=NUM_ROUNDS // NUM_HEATS,
            num_lanes=16,
        )
        all_winners |= winners
        all_seconds += seconds
        num_rounds += NUM_ROUNDS // NUM_HEATS
    say(where, 16, f"{num_rounds} of {NUM_ROUNDS}", all_winners, all_seconds)
