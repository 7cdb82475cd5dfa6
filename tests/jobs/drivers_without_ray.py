"""Drivers of one job as real processes, all but Ray and the model real; a program of its own.

``python -m tests.jobs.drivers_without_ray JOB NUMBER`` lets so many drivers work at a job that is
planned and prints one line of JSON for each. They are forks of one process, which has imported
everything once; none of them has opened a store before.
"""

import contextlib
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import runner
from jobs.claim import OpenJob, newest_generation
from jobs.cluster import Cluster
from jobs.plan import read_plan
from jobs.record import read_job
from pipeline import graph
from pipeline.graph import PendingPart
from pipeline.stages import PublishShard, StageContext, is_draining, make_pngs
from pipeline.storage import StorageOptions, open_store
from pipeline.tables import ShardReceipt, shards_from_table
from tests.jobs.job_parts import Job

_LONGEST_SHARD_S = 0.05


def annotate(
    job: Job, context: StageContext, parts: Sequence[PendingPart], *_: object
) -> Iterator[ShardReceipt]:
    """What the graph does, in this process and with made-up class ids."""
    publish = PublishShard(context)
    for part in parts:
        table = pq.read_table(pa.BufferReader(job.store.read(part.key)))
        shards = {shard.shard_id: shard for shard in shards_from_table(table)}
        for shard_id in part.shard_ids:
            done = job.store.head(context.layout.commit_key(shard_id)) is not None
            if done or is_draining(context):
                continue
            time.sleep(random.random() * _LONGEST_SHARD_S)
            yield publish.publish(job.annotated(shards[shard_id]))


def draw(
    context: StageContext, data_keys: Sequence[tuple[int, str, str]]
) -> Iterator[ShardReceipt]:
    """What the graph of the PNGs does."""
    store = context.store()
    for shard_id, key, _ in data_keys:
        make_pngs(store, context.layout, shard_id, store.read(key))
        yield ShardReceipt(shard_id=shard_id, won=False, num_rows=0, num_ok=0, size_bytes=0)


@contextlib.contextmanager
def no_cluster(_settings: object) -> Iterator[Cluster]:
    """No Ray at all."""
    yield Cluster(num_cpus=2.0, num_gpus=0.0, embedded=True)


def drive(url: str, start: Any, answers: Any) -> None:
    """One driver."""
    store = open_store(url, StorageOptions())
    record = read_job(store)
    spec = record.job_spec()
    open_job = OpenJob(store, record, spec, newest_generation(store))
    plan = read_plan(store, open_job.generation)
    assert plan is not None
    job = Job(spec=spec, store=store, record=record, plan=plan, shards=[])
    runner.connect = no_cluster
    graph.run_graph = partial(annotate, job)
    graph.run_png_graph = draw
    start.wait()
    answers.put(asdict(runner.drive(open_job)))


def main(url: str, number: int) -> None:
    """Let ``number`` drivers work at once."""
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(number), context.Queue()
    drivers = [context.Process(target=drive, args=(url, start, answers)) for _ in range(number)]
    for driver in drivers:
        driver.start()
    results = [answers.get(timeout=120) for _ in drivers]
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0] * number
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
