"""The command line, whose stages note in a file which shard they begin and end, and where.

`python -m tests.integration.traced_cli run ...` is `segformer3d run ...` otherwise.
Reading `TRACE_FOLDER/<digest of the job's URL>` then tells how often each shard was computed.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pipeline import graph
from pipeline.stages import DecodeShard, PublishShard, StageContext
from pipeline.tables import AnnotatedShard, DecodedShard, shards_from_table

TRACE_FOLDER = "SEGFORMER3D_TRACE_FOLDER"

Stage = Literal["decode", "annotate", "publish", "receipt"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a trace.

    Attributes:
        at: When, in seconds since 1970.
        pid: Which process.
        stage: What it does; ``receipt`` is the driver's.
        shard_id: To which shard.
        begins: Whether it begins or ends.
        is_empty: At an end, whether the shard fell through: it was committed already, or the job
            is draining.
    """

    at: float
    pid: int
    stage: Stage
    shard_id: int
    begins: bool
    is_empty: bool = False


def trace_path(job_url: str) -> Path:
    """Where the trace of one job lies."""
    name = hashlib.sha256(job_url.rstrip("/").encode()).hexdigest()
    return Path(os.environ[TRACE_FOLDER], name)


def read_trace(path: Path) -> list[Event]:
    """What has happened so far, in order; a line that is just being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return sorted((Event(**json.loads(line)) for line in lines), key=lambda event: event.at)


def _note(context: StageContext, stage: Stage, shard_id: int, **more: bool) -> None:
    event = Event(at=time.time(), pid=os.getpid(), stage=stage, shard_id=shard_id, **more)
    line = json.dumps(asdict(event)) + "\n"
    # One write to a file opened for appending is never torn by those of other processes.
    handle = os.open(trace_path(context.job_url), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


class _Note:
    """How a stage's call ended."""

    is_empty = False


@contextlib.contextmanager
def _noted(context: StageContext, stage: Stage, shard_id: int) -> Iterator[_Note]:
    _note(context, stage, shard_id, begins=True)
    note = _Note()
    yield note
    _note(context, stage, shard_id, begins=False, is_empty=note.is_empty)


class TracedDecode(DecodeShard):
    def __call__(self, table: pa.Table) -> pa.Table:
        (spec,) = shards_from_table(table)
        with _noted(self.context, "decode", spec.shard_id) as note:
            decoded = super().__call__(table)
            note.is_empty = decoded.num_rows == 0
        return decoded


class TracedActor(graph.AnnotateActor):
    def __call__(self, table: pa.Table) -> pa.Table:
        if table.num_rows == 0:
            return super().__call__(table)
        with _noted(self.context, "annotate", DecodedShard.from_table(table).shard_id) as note:
            annotated = super().__call__(table)
            note.is_empty = annotated.num_rows == 0
        return annotated


class TracedPublish(PublishShard):
    def __call__(self, table: pa.Table) -> pa.Table:
        if table.num_rows == 0:
            return super().__call__(table)
        with _noted(self.context, "publish", AnnotatedShard.from_table(table).shard_id):
            return super().__call__(table)


def _traced_run_graph(context: StageContext, *arguments: Any) -> Iterator[Any]:
    for receipt in _run_graph(context, *arguments):
        _note(context, "receipt", receipt.shard_id, begins=False)
        yield receipt


_run_graph = graph.run_graph


def trace() -> None:
    """Put the stages that note what they do in the place of the plain ones."""
    for name, traced in {
        "DecodeShard": TracedDecode,
        "AnnotateActor": TracedActor,
        "PublishShard": TracedPublish,
        "run_graph": _traced_run_graph,
    }.items():
        assert hasattr(graph, name)
        setattr(graph, name, traced)


if __name__ == "__main__":
    from jobs.cli import main
    from tests.integration import traced_cli

    # Under its own name, which Ray's workers can import.
    traced_cli.trace()
    main()
