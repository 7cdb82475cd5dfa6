"""Many seeds of the simulation, in this process or on all cores, and what they came to."""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

from tests.simulation.job import simulate, simulation
from tests.simulation.world import MISHAPS

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

# Without any of these, a run of many seeds would prove little.
MUST_HAPPEN = (
    *MISHAPS,
    "commits won",
    "commits lost",
    "snapshots",
    "signals",
    "cancels",
    "repeated tasks",
    "workers replaced",
    "resumes that were cancelled",
    "seeds with 16 drivers",
)
_CHUNK = 250
_PROGRESS_EVERY_S = 30.0


def run_seeds(seeds: Iterable[int]) -> Counter[str]:
    """Run seeds one after the other and count what happened in them.

    Raises:
        AssertionError: At the first that breaks a rule, with its whole schedule.
    """
    counts: Counter[str] = Counter()
    with simulation():
        for seed in seeds:
            outcome = simulate(seed)
            if outcome.broken:
                message = (
                    f"seed {seed} breaks a rule: {outcome.broken}\n{outcome.schedule}\n"
                    f"once more: SIMULATION_SEED={seed} pytest -s tests/simulation -k once_more"
                )
                raise AssertionError(message)
            counts.update(outcome.counts)
            counts["seeds"] += 1
    return counts


def run_on_all_cores(
    first: int, count: int, say: Callable[[str], None], is_over: Callable[[], bool]
) -> Counter[str]:
    """Run ``count`` seeds, or as many of the first as there is time for, a process per core.

    ``say`` is told now and then how far they are.
    """
    counts: Counter[str] = Counter()
    started = said = time.monotonic()
    chunks = [
        range(start, min(start + _CHUNK, first + count))
        for start in range(first, first + count, _CHUNK)
    ]
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.SimpleQueue()
    allowed = os.sched_getaffinity(0)
    for core in allowed:
        cores.put(core)
    with ProcessPoolExecutor(len(allowed), spawn, _keep_to_a_core, (cores,)) as pool:
        futures = [pool.submit(run_seeds, chunk) for chunk in chunks]
        for done in as_completed(futures):
            if done.cancelled():
                continue
            try:
                counts.update(done.result())
            except AssertionError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            if is_over():
                # What has begun is counted, so those that ran are the first ones.
                for future in futures:
                    future.cancel()
            now = time.monotonic()
            if now - said > _PROGRESS_EVERY_S:
                said = now
                rate = counts["seeds"] / (now - started)
                left_min = (count - counts["seeds"]) / rate / 60
                say(f"{counts['seeds']:,} seeds, {rate:.0f}/s, {left_min:.0f} min left")
    return counts


def _keep_to_a_core(cores: "SimpleQueue[int]") -> None:
    """One of its threads runs at a time: handing over within a core is a fifth faster."""
    os.sched_setaffinity(0, {cores.get()})


def proof(counts: Counter[str], seconds: float) -> str:
    """One line of figures."""
    num_faults = sum(counts[name] for name in MISHAPS)
    return (
        f"PROOF simulation: {counts['seeds']:,} seeds in {seconds:.0f} s, "
        f"{counts['drivers']:,} drivers, {counts['requests']:,} requests, "
        f"{num_faults:,} faults of {len(MISHAPS)} kinds, "
        f"{counts['shards']:,} shards decided, {counts['commits lost']:,} attempts lost, "
        f"{counts['snapshots']:,} snapshots, 0 rules broken"
    )


def check_happened(counts: Counter[str]) -> None:
    """Assert that all that should have been met with was."""
    assert [name for name in MUST_HAPPEN if not counts[name]] == []
