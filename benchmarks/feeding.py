"""How well a job's way through Ray Data feeds a fast GPU; there need not be one.

    python -m benchmarks.feeding [--model-ms 45] [--in-flight 3 8] [--rounds 3]

Stand-ins that sleep take the places of the three stages, around an actor of the same threads: what
is left is what Ray takes to hand shards on. Its driver, its workers and the stand-ins share this
machine's cores, so a slow machine hands on fewer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import ray.data

from benchmarks.model import machine
from jobs.cluster import connect
from jobs.spec import RaySection
from pipeline.actors import GpuActor
from pipeline.graph import _TASK
from pipeline.ray_data import configured

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

STORE_BYTES = 1 << 30
WARM_SHARE = 3  # the first third: workers start
LOOKS = {False: "Ray Data's own", True: "the job's"}


def main() -> None:
    """Measure and print."""
    given = _arguments()
    ways = list(product(given.in_flight, LOOKS))
    rates: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
    with connect(RaySection(num_cpus=given.tasks, object_store_bytes=STORE_BYTES)):
        for turn, way in product(range(given.rounds), ways):
            print(f"round {turn + 1}: {way[0]} sent, looks: {LOOKS[way[1]]}", file=sys.stderr)
            rates[way].append(_rate(given, *way))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine()}")
    print(f"{given.shards} shards, {given.tasks} decoders, {given.tasks} publishers, one model")
    print()
    print("| shards sent at a time | looks | shards/s | of what the model takes |")
    print("|---|---|---|---|")
    for (in_flight, often), found in rates.items():
        rate = statistics.median(found)
        share = rate * given.model_ms / 1000
        print(f"| {in_flight} | {LOOKS[often]} | {rate:.1f} | {share:.1%} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-ms", type=float, default=45, help="a shard; default: 45")
    parser.add_argument("--decode-ms", type=float, default=300, help="a shard; default: 300")
    parser.add_argument("--publish-ms", type=float, default=100, help="a shard; default: 100")
    parser.add_argument("--tasks", type=int, default=16, help="of each kind; default: 16")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[3, 8], help="default: 3 8")
    parser.add_argument("--shards", type=int, default=900, help="default: 900")
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    return parser.parse_args()


def _rate(given: argparse.Namespace, in_flight: int, often: bool) -> float:
    """Shards a second, once all workers are there."""
    with configured(for_gpus=often), warnings.catch_warnings():
        # As in `pipeline.graph`.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = _wired(given, in_flight)
        ends = [
            time.perf_counter()
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow")
            for _ in range(len(block))
        ]
    first = given.shards // WARM_SHARE
    return (len(ends) - first) / (ends[-1] - ends[first - 1])


def _wired(given: argparse.Namespace, in_flight: int) -> ray.data.Dataset:
    items = [{"shard": index} for index in range(given.shards)]
    plan = ray.data.from_items(items, override_num_blocks=len(items))
    task = {"batch_format": "pyarrow", "zero_copy_batch": True, "concurrency": given.tasks} | _TASK
    return (
        plan.map_batches(partial(_sleep, given.decode_ms), batch_size=1, **task)
        .map_batches(
            StandIn,
            fn_constructor_args=(given.model_ms,),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=1,
                max_tasks_in_flight_per_actor=in_flight,
                max_concurrent_calls_per_actor=StandIn.AT_A_TIME,
                enable_true_multi_threading=True,
            ),
        )
        .map_batches(partial(_sleep, given.publish_ms), batch_size=None, **task)
    )


def _sleep(milliseconds: float, table: pa.Table) -> pa.Table:
    # The work of a stage, which takes no core of this machine's.
    time.sleep(milliseconds / 1000)
    return table


class StandIn:
    """A GPU's actor: one thread begins shards, and may while the one before is in the model."""

    AT_A_TIME = GpuActor.SHARDS_AT_A_TIME

    def __init__(self, model_ms: float) -> None:
        self._model_s = model_ms / 1000
        self._model = ThreadPoolExecutor(1)
        self._until_s = 0.0

    def __call__(self, table: pa.Table) -> pa.Table:
        """Take a shard's time, from when the model is free."""
        self._model.submit(self._begin).result()()
        return table

    def _begin(self) -> Callable[[], None]:
        begun_s = max(time.perf_counter(), self._until_s)
        self._until_s = until_s = begun_s + self._model_s
        # Half of its frames have left for the device before the other half are computed.
        _sleep_until(until_s - self._model_s / 2)
        return partial(_sleep_until, until_s)


def _sleep_until(when_s: float) -> None:
    # A GPU's work, likewise.
    time.sleep(max(0.0, when_s - time.perf_counter()))


if __name__ == "__main__":
    main()
