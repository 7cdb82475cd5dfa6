"""Sixteen writers race for one commit: on a local disk, on a real S3 server (weed) and on moto's.

RACE_ROUNDS says how many rounds the slow suite runs on each.
"""

import hashlib
import os
import time
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.commit import parse_commit
from pipeline.storage import StorageOptions, Store, open_store
from tests.racers import GENERATION, PLAN_ID, Report, race

NUM_WRITERS = 16
NUM_FAST_ROUNDS = 8
NUM_ROUNDS = int(os.environ.get("RACE_ROUNDS", "1000"))


Place = tuple[str, str, StorageOptions]


@pytest.fixture(params=["local", "weed", "moto"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return "local disk", str(tmp_path / "job"), StorageOptions()
    endpoint_url = request.getfixturevalue(
        "s3_server" if request.param == "weed" else "moto_server"
    )
    return request.param, f"s3://out/{uuid4().hex}", StorageOptions(endpoint_url=endpoint_url)


def check_race(place: Place, *, num_processes: int, num_rounds: int, num_lanes: int) -> None:
    name, url, options = place
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
    print(
        f"PROOF race on {name}: {NUM_WRITERS} writers in "
        f"{num_processes} processes, {num_rounds} rounds in {seconds:.0f} s, one winner each, "
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
    check_race(place, num_processes=2, num_rounds=NUM_FAST_ROUNDS, num_lanes=4)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_a_thousand_races_have_one_winner_each(place: Place) -> None:
    check_race(place, num_processes=16, num_rounds=NUM_ROUNDS, num_lanes=16)
