"""How fast one model annotates JPEGs end to end, on a GPU above all, and what Ray takes of it.

    python -m benchmarks.end_to_end [--variant mit_b3] [--frames 16384] [--no-ray | --only-job]

One after the other: the bare model; each of the three stages alone; all three as a pipeline of
threads, without Ray; and `segformer3d run`. The stages are the job's own callables. No pipeline can
be faster than the slowest of the model, decoding and publishing alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import TYPE_CHECKING, Self, TypeVar

import torch

from benchmarks.job import SIZE, make_archive, planned, rate_after, run_job
from benchmarks.model import machine
from pipeline.stages import AnnotateShard, DecodeShard, PublishShard
from pipeline.tables import AnnotatedShard, DecodedShard, ShardReceipt
from segformer3d.gpu_lanes import CALLS_TO_RECORD
from segformer3d.weights import untrained_weights
from segformer3d.weights_file import bundled_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    import pyarrow as pa

    from pipeline.stages import StageContext

    Span = tuple[float, float]  # from when to when, in seconds since 1970

A = TypeVar("A")
B = TypeVar("B")

MODEL, ANNOTATE = "model alone (P)", "annotate alone, one thread"
DECODE, PUBLISH = "decode alone (D)", "publish alone (W)"
THREADS, JOB = "all stages in threads, no Ray", "whole job, staged"
BUNDLED = "mit_b0"
ALONE_S = 6.0  # of each way that is measured by itself
QUEUED = 4  # shards that wait between two stages
AT_A_TIME = 2  # shards in the model: the next one's frames are there when the last one is through
KEPT_SHARDS = 4  # decoded ones for the model alone: more than its cache holds
SAMPLE_S = 0.1
# Only then are the model's graphs recorded.
WARM_SHARDS = CALLS_TO_RECORD


@dataclass(kw_only=True)
class Report:
    """All that is printed.

    Attributes:
        machine: Processor, cores, load, and versions.
        device: Name of the GPU, or CPU.
        date: When.
        variant: Of the encoder.
        frames: Of the archive.
        shard_frames: Of one shard.
        decoders: Decoding threads, or tasks of the job.
        publishers: Publishing threads.
        rates: Frames a second of each way.
        model_busy: Share of the time that a shard was in the model, by way.
        gpu_busy: Share of the time that the GPU ran any kernel, by way; without NVML nothing.
        first_commit_s: From the job's command to its first committed shard.
        limit: What the job says of its stages.
    """

    machine: str
    device: str
    date: str
    variant: str
    frames: int
    shard_frames: int
    decoders: int
    publishers: int
    rates: dict[str, float] = field(default_factory=dict)
    model_busy: dict[str, float] = field(default_factory=dict)
    gpu_busy: dict[str, float] = field(default_factory=dict)
    first_commit_s: float | None = None
    limit: str | None = None

    def keep(self, way: str, rate: float) -> None:
        """Take a rate down, and say it: whoever stops this knows what there was."""
        self.rates[way] = rate
        _say(f"{way}: {rate:.1f} frames/s")


def main() -> None:
    """Measure and print."""
    given = _arguments()
    if given.device == "cpu":
        # For the job's processes too.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu tries the script out")
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        report = measure(Path(name), given)
    print(json.dumps(asdict(report), indent=2) if given.json else "\n".join(table(report)))


def _arguments() -> argparse.Namespace:
    cpus = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--variant", default=BUNDLED, help=f"default: {BUNDLED}, in the box; others: random weights"
    )
    parser.add_argument("--frames", type=int, default=4096, help="of the archive (default: 4096)")
    parser.add_argument("--shard-frames", type=int, default=64, help="default: 64")
    parser.add_argument(
        "--decoders", type=int, default=max(1, cpus - 2), help="default: all cores but two"
    )
    parser.add_argument(
        "--publishers", type=int, default=max(1, cpus // 4), help="default: a fourth of the cores"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-ray", action="store_true", help="leave the job out")
    which.add_argument("--only-job", action="store_true", help="leave all but the job out")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the job, such as ray.object_store_bytes=8000000000",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    if given.frames <= WARM_SHARDS * given.shard_frames:
        parser.error(f"--frames must fill more than {WARM_SHARDS} shards")
    return given


def measure(folder: Path, given: argparse.Namespace) -> Report:
    """Measure every way in turn, in a folder that may be filled."""
    on_gpu = given.device == "cuda"
    report = Report(
        machine=machine(),
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        variant=given.variant,
        frames=given.frames,
        shard_frames=given.shard_frames,
        decoders=given.decoders,
        publishers=given.publishers,
    )
    _say("drawing the archive")
    make_archive(folder / "archive", given.frames)
    weights = bundled_weights() if given.variant == BUNDLED else untrained_weights(given.variant)
    (folder / "weights").write_bytes(weights)
    with GpuClock(on=on_gpu) as clock:
        if not given.only_job:
            _without_ray(folder, weights, report, clock)
        if not given.no_ray:
            _whole_job(folder, report, clock, given.set)
    return report


def _without_ray(folder: Path, weights: bytes, report: Report, clock: GpuClock) -> None:
    output = folder / "out"
    context, tables = planned(str(folder / "archive"), str(output), report.shard_frames)
    with ExitStack() as stack:
        decoders = stack.enter_context(Threads(report.decoders))
        publishers = stack.enter_context(Threads(report.publishers))
        decode = DecodeShard(context)
        # Each thread's first call starts its decoding child.
        decoders.warm(lambda: decode(tables[0]))
        decode_rate = _rate_alone(
            decoders, lambda table: _num_frames(decode(table)), itertools.cycle(tables), DECODE
        )
        report.keep(DECODE, decode_rate)
        # The model is this thread's, in which torch is told how many threads it may take.
        annotate = AnnotateShard(context, weights)
        kept = [decoded for _, decoded in decoders.run(decode, tables[:KEPT_SHARDS])]
        annotated = _model_alone(annotate, kept, report, clock)
        report.keep(PUBLISH, _publish_alone(publishers, context, annotated, len(tables)))
        _say(THREADS)
        commits = pipelined(decoders, publishers, annotate, tables)
    shutil.rmtree(output)
    report.keep(THREADS, rate_after([(when, receipt.num_rows) for when, receipt in commits], 1))
    window = commits[0][0], commits[-1][0]
    in_model_s = sum(receipt.annotate_s for _, receipt in commits[1:])
    report.model_busy[THREADS] = in_model_s / (window[1] - window[0])
    clock.note(report, THREADS, window)


def _model_alone(
    annotate: AnnotateShard, kept: Sequence[pa.Table], report: Report, clock: GpuClock
) -> pa.Table:
    """Time the model, then its whole stage, over shards again and again; give an annotated one."""
    for _ in range(WARM_SHARDS):
        annotated = annotate(kept[0])
    shards = [DecodedShard.from_table(table) for table in kept]
    ways: dict[str, Callable[[int], Callable[[], object]]] = {
        MODEL: lambda turn: annotate.predictor.start(shards[turn].pixels),
        ANNOTATE: lambda turn: annotate.begin(kept[turn]),
    }
    for way, begin in ways.items():
        _say(way)
        started, turns = time.time(), itertools.cycle(range(len(kept)))
        done = ended(_for_a_while(turns), begin)
        frames = sum(len(shards[turn].pixels) for turn, _ in done)
        window = started, time.time()
        report.keep(way, frames / (window[1] - window[0]))
        clock.note(report, way, window)
    return annotated


def _for_a_while(items: Iterable[A]) -> Iterator[A]:
    until = time.time() + ALONE_S
    return itertools.takewhile(lambda _: time.time() < until, items)


def ended(items: Iterable[A], begin: Callable[[A], Callable[[], B]]) -> Iterator[tuple[A, B]]:
    """Begin each item before the one before it is ended; give items and what they end with."""
    begun: deque[tuple[A, Callable[[], B]]] = deque()
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) == AT_A_TIME:
            first, end = begun.popleft()
            yield first, end()
    for item, end in begun:
        yield item, end()


def _publish_alone(
    publishers: Threads, context: StageContext, annotated: pa.Table, first_free: int
) -> float:
    """Frames a second; every shard is committed under a number that the plan does not have."""
    publish = PublishShard(context)

    def as_number(shard_id: int) -> int:
        shard = AnnotatedShard.from_table(annotated)
        return publish.publish(replace(shard, shard_id=shard_id)).num_rows

    return _rate_alone(publishers, as_number, itertools.count(first_free), PUBLISH)


def _rate_alone(threads: Threads, call: Callable[[A], int], items: Iterable[A], way: str) -> float:
    """Frames a second of a stage that gives its number of frames, with all threads at work."""
    _say(way)
    until = time.time() + ALONE_S
    done = sorted(threads.run(call, _for_a_while(items)))
    # At the end threads run out of work, one by one.
    whole = [item for item in done if item[0] <= until]
    return rate_after(whole if len(whole) > threads.count else done, threads.count)


def _num_frames(decoded: pa.Table) -> int:
    return len(DecodedShard.from_table(decoded).frames)


def pipelined(
    decoders: Threads, publishers: Threads, annotate: AnnotateShard, tables: Sequence[pa.Table]
) -> list[tuple[float, ShardReceipt]]:
    """Decode, annotate and publish shards at the same time, beginning them in this thread.

    Returns:
        When each shard was committed, in order of time.
    """

    def end(begun: Callable[[], pa.Table]) -> pa.Table:
        return begun()

    with Threads(1) as ender:
        decoded = decoders.run(DecodeShard(annotate.context), tables)
        begun = (annotate.begin(table) for _, table in decoded)
        annotated = (table for _, table in ender.run(end, begun))
        published = publishers.run(PublishShard(annotate.context), annotated)
        commits = [
            (when, receipt)
            for when, receipts in published
            for receipt in ShardReceipt.all_from_table(receipts)
        ]
    return sorted(commits, key=lambda commit: commit[0])


def _whole_job(folder: Path, report: Report, clock: GpuClock, settings: Sequence[str]) -> None:
    _say(JOB)
    fixed = [
        f"model.weights={folder / 'weights'}",
        f"shard.frames={report.shard_frames}",
        "ray.max_actors=1",
        f"ray.max_io_tasks={report.decoders}",
    ]
    run = run_job(str(folder / "archive"), str(folder / "job"), [*fixed, *settings])
    report.keep(JOB, rate_after(run.commits, WARM_SHARDS))
    clock.note(report, JOB, (run.commits[WARM_SHARDS - 1][0], run.commits[-1][0]))
    report.first_commit_s = run.commits[0][0] - run.started
    report.limit = next(line for line in run.said.splitlines() if line.startswith("Busy: "))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Threads:
    """Threads for one stage.

    Attributes:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def warm(self, call: Callable[[], object]) -> None:
        """Call once in each thread."""
        # None of them can take a second call before each has one.
        everyone = Barrier(self.count)

        def once() -> None:
            everyone.wait()
            call()

        for future in [self._pool.submit(once) for _ in range(self.count)]:
            future.result()

    def run(self, call: Callable[[A], B], items: Iterable[A]) -> Iterator[tuple[float, B]]:
        """Call with each item; results with their times, in the items' order.

        Whoever takes the results waits for the threads, and they for him where he is behind by
        as many shards as a queue holds.
        """

        def timed(item: A) -> tuple[float, B]:
            made = call(item)
            return time.time(), made

        waiting: deque[Future[tuple[float, B]]] = deque()
        for item in items:
            waiting.append(self._pool.submit(timed, item))
            if len(waiting) == self.count + QUEUED:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class GpuClock:
    """Samples whether the GPU is at work, where there is one and NVML's Python module."""

    def __init__(self, *, on: bool) -> None:
        self._samples: list[tuple[float, int]] = []
        self._over = Event()
        self._thread: Thread | None = None
        if on and importlib.util.find_spec("pynvml") is not None:
            self._thread = Thread(target=self._sample)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def note(self, report: Report, way: str, window: Span) -> None:
        """Put the mean of a window's samples into the report, if there are any."""
        inside = [percent for when, percent in self._samples if window[0] <= when <= window[1]]
        if inside:
            report.gpu_busy[way] = sum(inside) / len(inside) / 100

    def _sample(self) -> None:
        from pynvml import NVMLError  # type: ignore[import-not-found,unused-ignore]

        while not self._over.wait(SAMPLE_S):
            try:
                self._samples.append((time.time(), torch.cuda.utilization()))
            except NVMLError:
                # Not every GPU says, nor any part of one.
                return


def table(report: Report) -> Iterator[str]:
    """Markdown."""
    yield f"{report.date}, {report.machine}, {report.device}"
    weights = "weights in the box" if report.variant == BUNDLED else "random weights"
    yield (
        f"{report.variant}, {weights}, {report.frames} JPEGs of {SIZE[1]}x{SIZE[0]} in shards of "
        f"{report.shard_frames}, {report.decoders} decoders, {report.publishers} publishers"
    )
    yield ""
    yield "| | frames/s | kept of min(P, D, W) | model stage busy | GPU busy |"
    yield "|---|---|---|---|---|"
    alone = [report.rates[way] for way in (MODEL, DECODE, PUBLISH) if way in report.rates]
    for way in (MODEL, ANNOTATE, DECODE, PUBLISH, THREADS, JOB):
        if way in report.rates:
            rate = report.rates[way]
            kept = f"{rate / min(alone):.1%}" if alone and way in {THREADS, JOB} else ""
            shares = [
                f"{busy[way]:.1%}" if way in busy else ""
                for busy in (report.model_busy, report.gpu_busy)
            ]
            yield f"| {way} | {rate:.1f} | {kept} | {' | '.join(shares)} |"
    if report.limit is not None:
        yield ""
        yield f"The job: {report.limit} Its first shard came after {report.first_commit_s:.1f} s."


if __name__ == "__main__":
    main()
