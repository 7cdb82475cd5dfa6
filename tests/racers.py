"""Writers in real processes that race for commits, each with a store of its own."""

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Barrier
from queue import Empty
from typing import Any

from pipeline.commit import commit_attempt
from pipeline.layout import Generation
from pipeline.records import FrameRecord
from pipeline.storage import StorageOptions, Store, open_store

GENERATION = Generation()
PLAN_ID = "plan"
FRAMES = (FrameRecord(asset="a.jpg", frame_index=0, pts_s=None, width=64, height=64),)
_START_TIMEOUT_S = 120.0
_ROUND_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Report:
    """What one writer says of one round.

    Attributes:
        round: The shard that was raced for.
        writer: Who says so.
        won: Whether it says that it won.
        attempt: Who won, by its words.
    """

    round: int
    writer: str
    won: bool
    attempt: str


def race(
    url: str,
    options: StorageOptions,
    *,
    num_processes: int,
    num_threads: int,
    num_rounds: int,
    num_lanes: int,
) -> dict[int, list[Report]]:
    """Let ``num_processes * num_threads`` writers race, and return their reports by round.

    Args:
        url: The job.
        options: How to reach it.
        num_processes: Processes.
        num_threads: Writers of each, every one with a store of its own.
        num_rounds: Shards to race for.
        num_lanes: How many rounds may be under way at a time: on some stores losing takes seconds.
    """
    context = multiprocessing.get_context("spawn")
    barriers = [context.Barrier(num_processes * num_threads) for _ in range(num_lanes)]
    answers = context.Queue()
    work = (url, options, num_threads, num_rounds, barriers, answers)
    racers = [
        context.Process(target=_run, args=(f"p{index}", *work)) for index in range(num_processes)
    ]
    reports: list[Report] = []
    with _running(racers):
        for _ in racers:
            reports += _next(answers, racers)
    reports.sort(key=lambda report: report.round)
    return {number: list(group) for number, group in groupby(reports, lambda item: item.round)}


@contextmanager
def _running(racers: list[SpawnProcess]) -> Iterator[None]:
    for racer in racers:
        racer.start()
    try:
        yield
        for racer in racers:
            racer.join(_START_TIMEOUT_S)
    finally:
        for racer in racers:
            racer.kill()
            racer.join()


def _next(answers: Any, racers: list[SpawnProcess]) -> list[Report]:
    while True:
        try:
            answer = answers.get(timeout=1)
        except Empty:
            if any(racer.exitcode for racer in racers):
                message = "a racer died"
                raise RuntimeError(message) from None
            continue
        if isinstance(answer, BaseException):
            raise answer
        return list(answer)


def _run(
    name: str,
    url: str,
    options: StorageOptions,
    num_threads: int,
    num_rounds: int,
    barriers: list[Barrier],
    answers: Any,
) -> None:
    def connect(thread: int) -> Store:
        store = open_store(url, options)
        # Connected before the race begins, which then is one for the record alone.
        store.exists(f"warm/{name}-{thread}")
        store.delete([f"warm/{name}-{thread}"])
        return store

    def write(place: int) -> list[Report]:
        thread, lane = divmod(place, len(barriers))
        writer, store = f"{name}-{thread}", stores[thread]
        barriers[lane].wait(_START_TIMEOUT_S)
        reports = []
        for number in range(lane, num_rounds, len(barriers)):
            barriers[lane].wait(_ROUND_TIMEOUT_S)
            data = f"round {number} by {writer}".encode()
            record, won = commit_attempt(store, GENERATION, PLAN_ID, number, FRAMES, data)
            reports.append(Report(number, writer, won, record.attempt))
        return reports

    num_places = num_threads * len(barriers)
    try:
        stores = [connect(thread) for thread in range(num_threads)]
        with ThreadPoolExecutor(num_places) as pool:
            answers.put([report for told in pool.map(write, range(num_places)) for report in told])
    except (Exception, threading.BrokenBarrierError) as error:  # noqa: BLE001 - for the test to raise
        for barrier in barriers:
            barrier.abort()
        answers.put(RuntimeError(f"{name}: {error!r}"))
