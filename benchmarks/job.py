"""How much of its model's speed a whole job keeps, and what Ray takes of it.

    python benchmarks/job.py [--frames 768] [--shard-frames 64] [--cpus 2] [--rounds 3] [--s3]
                             [--no-ray]

Each round measures, one after the other and on as many cores: the bare model; decoding and
publishing alone; the three stages in plain processes without Ray; and `segformer3d run` with either
graph. The job should come near 1 / (1 / P + 1 / D) frames a second, P those of the model and D
those of decoding and publishing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.model import machine
from jobs.planner import Planner, make_plan, open_output
from jobs.spec import check_spec
from pipeline.layout import Generation
from pipeline.stages import AnnotateShard, DecodeShard, PublishShard, StageContext
from pipeline.storage import StorageOptions, open_store
from pipeline.tables import AnnotatedShard, DecodedShard
from segformer3d.scenes import make_drive, render
from segformer3d.weights_file import bundled_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SIZE = (1024, 512)
DISTINCT_DRIVES, FRAMES_PER_DRIVE = 16, 4
BARE_S = 12.0
JPEG_QUALITY = 90
MODEL, REST, STAGES = "model alone", "decode + publish alone", "stages, no Ray"
JOBS = {"fused": "whole job, fused", "staged": "whole job, staged"}

Commit = tuple[float, int]  # when, in seconds since 1970, and how many frames


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """What is seen of a job from outside.

    Attributes:
        started: When it was asked for, in seconds since 1970.
        commits: Of each shard, in order of time.
        said: What it wrote on standard error.
    """

    started: float
    commits: Sequence[Commit]
    said: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is printed.

    Attributes:
        machine: Processor, cores, load, and versions.
        date: When.
        store: Where archive and output were.
        cpus: Cores, and processes or actors.
        frames: Of one job.
        shard_frames: Of one shard.
        rates: Frames a second of each way, the median over the rounds.
        bound: 1 / (1 / P + 1 / D), in frames a second.
        kept: The rate of each way through all stages over the bound: the median of the rounds' own
            ratios.
        first_commit_s: From the command to the first committed shard, by way.
    """

    machine: str
    date: str
    store: str
    cpus: int
    frames: int
    shard_frames: int
    rates: dict[str, float]
    bound: float
    kept: dict[str, float]
    first_commit_s: dict[str, float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=768, help="of the job's archive")
    parser.add_argument("--shard-frames", type=int, default=64, help="frames of a shard")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3", action="store_true", help="on a real S3 server on loopback")
    parser.add_argument("--graphs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--no-ray", action="store_true", help="leave the job out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    if given.no_ray:
        given.graphs = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="job-")))
        make_archive(folder / "archive", given.frames)
        archive, output = _places(stack, folder, s3=given.s3)
        rounds = [_round(archive, output, turn, given) for turn in range(given.rounds)]
    report = _report(rounds, given)
    print(json.dumps(asdict(report), indent=2) if given.json else "\n".join(table(report)))


def make_archive(folder: Path, num_frames: int) -> None:
    """Draw street scenes as JPEGs; a few distinct ones under many names."""
    folder.mkdir(parents=True)
    distinct = min(num_frames, DISTINCT_DRIVES * FRAMES_PER_DRIVE)
    for index in range(num_frames):
        path = folder / f"{index:06}.jpg"
        if index >= distinct:
            path.hardlink_to(folder / f"{index % distinct:06}.jpg")
            continue
        drive, place = divmod(index, FRAMES_PER_DRIVE)
        frame = render(make_drive(drive), 1 + 5.0 * place, *SIZE).frame
        quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        path.write_bytes(cv2.imencode(".jpg", frame[..., ::-1], quality)[1].tobytes())


def _places(stack: ExitStack, folder: Path, *, s3: bool) -> tuple[str, str]:
    if not s3:
        return str(folder / "archive"), str(folder / "out")
    from tests.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, run_s3_server

    endpoint = stack.enter_context(run_s3_server())
    os.environ |= {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": endpoint,
    }
    store = open_store("s3://frames/archive", StorageOptions())
    for path in sorted((folder / "archive").iterdir()):
        store.put(path.name, path.read_bytes())
    return "s3://frames/archive", "s3://out/job"


def _round(archive: str, output: str, turn: int, given: argparse.Namespace) -> dict[str, float]:
    rates: dict[str, float] = {}
    for way in (MODEL, REST, STAGES):
        print(f"round {turn + 1}: {way}", file=sys.stderr, flush=True)
        rates[way] = _in_processes(way, archive, f"{output}-{turn}-{way[:5].strip()}", given)
    for graph in given.graphs:
        way = JOBS[graph]
        print(f"round {turn + 1}: {way}", file=sys.stderr, flush=True)
        rates[way], rates[f"first commit, {way}"] = _job(
            archive, f"{output}-{turn}-{graph}", graph, given
        )
    return rates


def _in_processes(way: str, archive: str, output: str, given: argparse.Namespace) -> float:
    """Frames a second of so many processes that do the same beside each other."""
    spawn = multiprocessing.get_context("spawn")
    cpus, frames = given.cpus, given.shard_frames
    ready, done = spawn.Barrier(cpus), spawn.Queue()
    processes = [
        spawn.Process(target=_worker, args=(way, archive, output, index, cpus, frames, ready, done))
        for index in range(cpus)
    ]
    for process in processes:
        process.start()
    rates = [done.get() for _ in processes]
    for process in processes:
        process.join()
    return float(sum(rates))


def _worker(
    way: str,
    archive: str,
    output: str,
    index: int,
    cpus: int,
    shard_frames: int,
    ready: Any,
    done: Any,
) -> None:
    """Time one way on this process's share of the shards; everything is warm before."""
    cv2.setNumThreads(1)
    context, tables = planned(archive, f"{output}-{index}", shard_frames)
    own = tables[index::cpus] or tables
    decode, publish = DecodeShard(context), PublishShard(context)
    annotate = AnnotateShard(context, bundled_weights())
    decoded = DecodedShard.from_table(decode(own[0]))
    few = replace(decoded, frames=decoded.frames[:2], pixels=decoded.pixels[:2])
    sample = annotate.annotate(few)
    annotated = _repeated(decoded, sample)
    frames, turn = 0, 0
    publish.publish(replace(annotated, shard_id=10_000))
    ready.wait()
    started = time.perf_counter()
    while time.perf_counter() - started < BARE_S:
        turn += 1
        table, shard_id = own[turn % len(own)], 10_000 + turn
        if way == MODEL:
            annotate.predictor.predict(decoded.pixels[:4])
            frames += 4
        elif way == REST:
            DecodedShard.from_table(decode(table))
            publish(replace(annotated, shard_id=shard_id).to_table())
            frames += len(decoded.frames)
        else:
            shard = AnnotatedShard.from_table(annotate(decode(table)))
            publish.publish(replace(shard, shard_id=shard_id))
            frames += len(shard.frames)
    done.put(frames / (time.perf_counter() - started))


def _repeated(decoded: DecodedShard, sample: AnnotatedShard) -> AnnotatedShard:
    """A whole shard with the outputs of a few of its frames."""
    times = len(decoded.frames)
    assert sample.class_ids is not None
    assert sample.depth is not None
    return replace(
        sample,
        frames=decoded.frames,
        class_ids=(sample.class_ids * times)[:times],
        depth=(sample.depth * times)[:times],
        certainty=(sample.certainty * times)[:times],
    )


def planned(archive: str, output: str, shard_frames: int) -> tuple[StageContext, list[pa.Table]]:
    """What the stages need to know of a job, and its shards of full size, a row each."""
    spec = check_spec(
        {
            "input": {"url": archive},
            "output": {"url": output},
            "geometry": {"short_side_px": SIZE[1]},
            "shard": {"frames": shard_frames},
        },
        "the benchmark",
    )
    store = open_output(spec)
    plan = make_plan(store, Generation(), Planner(spec))
    context = StageContext(
        job_url=store.url,
        job_storage=StorageOptions(),
        archive_storage=StorageOptions(),
        generation=0,
        plan_id=plan.plan_id,
        lease=1,
        metadata={},
        limits=spec.limits.limits(),
    )
    parts = [pq.read_table(pa.BufferReader(store.read(part.key))) for part in plan.parts]
    rows = [part.slice(row, 1) for part in parts for row in range(part.num_rows)]
    # The first and the last are small, which the stages alone would be timed with.
    sizes = [len(row["slices"][0]) for row in rows]
    largest = max(sizes)
    return context, [row for row, size in zip(rows, sizes, strict=True) if size == largest]


def _job(archive: str, output: str, graph: str, given: argparse.Namespace) -> tuple[float, float]:
    """Frames a second once every model has committed, and when the first shard was there."""
    settings = [f"shard.frames={given.shard_frames}"]
    settings += [f"ray.num_cpus={given.cpus}", f"ray.graph={graph}"]
    run = run_job(archive, output, settings)
    if not output.startswith("s3://"):
        shutil.rmtree(output)
    # As many models start together: each one's first commit opens its own time.
    return rate_after(run.commits, given.cpus), run.commits[0][0] - run.started


def run_job(archive: str, output: str, settings: Sequence[str]) -> JobRun:
    """Run `segformer3d run` to its end, each setting written as for its `--set`.

    From now on SIGTERM ends this process by an exception, which takes the job along.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    command = [sys.executable, "-m", "jobs.cli", "run", "--input", archive, "--output", output]
    settings = [f"geometry.short_side_px={SIZE[1]}", *settings]
    command += [word for setting in settings for word in ("--set", setting)]
    started = time.time()
    lines = []
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            # As it comes: whoever stops this has seen how far it was.
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                lines.append(line)
        except BaseException:
            process.kill()
            raise
    said = "".join(lines)
    if process.returncode != 0:
        raise SystemExit(f"the job ended with {process.returncode}")
    store = open_store(output, StorageOptions())
    commits = [
        (_committed_at(output, item.key), int(json.loads(store.read(item.key))["num_rows"]))
        for item in store.list("gen-0000/commit/")
    ]
    return JobRun(started=started, commits=sorted(commits), said=said)


def rate_after(commits: Sequence[Commit], count: int) -> float:
    """Frames a second from the commit of that number to the last."""
    rows = sum(rows for _, rows in commits[count:])
    return rows / (commits[-1][0] - commits[count - 1][0])


def _committed_at(output: str, key: str) -> float:
    if not output.startswith("s3://"):
        return (Path(output) / key).stat().st_mtime
    import boto3

    bucket, _, prefix = output.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    return float(
        client.head_object(Bucket=bucket, Key=f"{prefix}/{key}")["LastModified"].timestamp()
    )


def _report(rounds: list[dict[str, float]], given: argparse.Namespace) -> Report:
    whole = [STAGES, *(JOBS[graph] for graph in given.graphs)]
    bounds = [1 / (1 / rates[MODEL] + 1 / rates[REST]) for rates in rounds]

    def kept(way: str) -> float:
        both = zip(rounds, bounds, strict=True)
        return statistics.median(rates[way] / bound for rates, bound in both)

    return Report(
        machine=machine(),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        store="S3 on loopback" if given.s3 else "local",
        cpus=given.cpus,
        frames=given.frames,
        shard_frames=given.shard_frames,
        rates={
            way: statistics.median(rates[way] for rates in rounds) for way in (MODEL, REST, *whole)
        },
        bound=statistics.median(bounds),
        kept={way: kept(way) for way in whole},
        first_commit_s={
            way: statistics.median(rates[f"first commit, {way}"] for rates in rounds)
            for way in whole[1:]
        },
    )


def table(report: Report) -> Iterator[str]:
    """Markdown."""
    yield f"{report.date}, {report.machine}"
    yield (
        f"weights in the box, JPEGs of {SIZE[1]}x{SIZE[0]}, {report.store}, {report.cpus} cores, "
        f"{report.frames} frames a job in shards of {report.shard_frames}"
    )
    yield ""
    yield "| | frames/s | kept | first committed shard after, s |"
    yield "|---|---|---|---|"
    for way, rate in report.rates.items():
        kept = f"{report.kept[way]:.1%}" if way in report.kept else ""
        first = f"{report.first_commit_s[way]:.1f}" if way in report.first_commit_s else ""
        yield f"| {way} | {rate:.2f} | {kept} | {first} |"
    yield f"| 1 / (1 / P + 1 / D) | {report.bound:.2f} | | |"


if __name__ == "__main__":
    main()
