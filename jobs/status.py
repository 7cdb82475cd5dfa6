"""What a job's storage says about it, with or without a driver alive."""

from dataclasses import dataclass
from typing import Literal

from jobs.finish import count_kinds
from jobs.generations import History
from jobs.lease import Heartbeat, heartbeats
from jobs.record import read_job
from pipeline.errors import (
    DAMAGE,
    JobError,
    Segformer3dError,
    StorageError,
    UserError,
    one_line,
    without_controls,
)
from pipeline.layout import JOB_KEY, OWN_PREFIXES
from pipeline.storage import StorageOptions, Store, join_url, open_store

JobState = Literal[
    "submitted", "planning", "running", "interrupted", "done", "quarantined", "unreadable"
]


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job at one moment.

    Attributes:
        url: Its URI.
        state: ``interrupted`` means unfinished with no driver alive; ``quarantined`` means done
            with inputs that could not be read; ``unreadable`` is a job, or a folder where one may
            be, that cannot be read itself.
        trained: Whether its weights are; False if unreadable.
        num_generations: Plans that the job has: the first, then one for each retry or repair.
        num_shards: Shards of the plans; 0 before there is one.
        num_done: Shards decided.
        num_frames: Planned frames, however often they were planned.
        num_ok: Frames annotated.
        num_quarantined: Frames with a typed error.
        quarantined: The same by kind.
        size_bytes: Bytes of committed Parquet.
        frames_per_s: Rate of the drivers alive, together.
        seconds_left: At that rate; None if nobody works.
        drivers: Those alive.
        problem: Why it is unreadable; otherwise empty.
    """

    url: str
    state: JobState
    trained: bool
    num_generations: int = 0
    num_shards: int = 0
    num_done: int = 0
    num_frames: int = 0
    num_ok: int = 0
    num_quarantined: int = 0
    quarantined: dict[str, int]
    size_bytes: int = 0
    frames_per_s: float = 0.0
    seconds_left: float | None = None
    drivers: tuple[Heartbeat, ...] = ()
    problem: str = ""

    def line(self) -> str:
        """One line for a listing."""
        if self.state == "unreadable":
            return without_controls(f"{self.url}  {self.state}  {self.problem}")
        share = 100 * self.num_done / self.num_shards if self.num_shards else 0
        line = f"{self.url}  {self.state}  {share:.0f}%  {self.num_frames} frames"
        return without_controls(line)

    def text(self) -> str:
        """A few lines for a person."""
        if self.state == "unreadable":
            return "\n".join(map(without_controls, (f"{self.url}: {self.state}", self.problem)))
        lines = [
            f"{self.url}: {self.state}",
            f"shards  {self.num_done} of {self.num_shards} decided",
            f"frames  {self.num_ok} annotated, {self.num_quarantined} quarantined"
            f" of {self.num_frames}",
            f"output  {self.size_bytes / 1e6:.1f} MB of Parquet",
        ]
        lines += [f"        {kind}: {count}" for kind, count in sorted(self.quarantined.items())]
        if self.num_generations > 1:
            lines.append(f"made in {self.num_generations} generations")
        for driver in self.drivers:
            lines.append(
                f"driver  process {driver.pid} on {driver.host}, {driver.state},"
                f" {driver.frames_per_s:.1f} frames/s"
            )
        if self.seconds_left is not None:
            lines.append(f"left    {self.seconds_left:.0f} s")
        if not self.trained:
            lines.append("The weights are untrained.")
        return "\n".join(map(without_controls, lines))


def job_status(url: str, storage: StorageOptions) -> JobStatus:
    """Read a job's manifest and its drivers' signs of life.

    Raises:
        UserError: If there is no job.
        JobError: If it is too damaged to be read.
    """
    try:
        return _job_status(url, storage)
    except DAMAGE as error:
        message = f"{url}: damaged: {error!r}; run `verify`"
        raise JobError(message) from error


def _job_status(url: str, storage: StorageOptions) -> JobStatus:
    store = open_store(url, storage)
    record = read_job(store)
    alive = tuple(heartbeat for heartbeat in heartbeats(store) if heartbeat.is_alive)
    history = History.load(store)
    if not history.views:
        return JobStatus(
            url=store.url,
            state=_unplanned(alive),
            trained=record.trained,
            quarantined={},
            drivers=alive,
        )
    rate = sum(heartbeat.frames_per_s for heartbeat in alive)
    newest = history.views[-1]
    finished = history.is_complete and store.head(newest.generation.success_key) is not None
    kinds = count_kinds(history.quarantined())
    num_bad = sum(kinds.values())
    num_left = newest.plan.num_frames - sum(item.num_rows for item in newest.records)
    state: JobState = "running" if alive else "interrupted"
    if finished:
        state = "quarantined" if num_bad else "done"
    elif alive and all(heartbeat.state == "submitted" for heartbeat in alive):
        state = "submitted"
    return JobStatus(
        url=store.url,
        state=state,
        trained=record.trained,
        num_generations=len(history.views),
        num_shards=history.num_shards,
        num_done=history.num_done,
        num_frames=history.num_frames,
        num_ok=history.num_ok,
        num_quarantined=num_bad,
        quarantined=kinds,
        size_bytes=history.size_bytes,
        frames_per_s=rate,
        seconds_left=num_left / rate if rate > 0 and not finished else None,
        drivers=() if finished else alive,
    )


def find_jobs(root: str, storage: StorageOptions) -> list[JobStatus]:
    """Every job at or below a URL, by URI.

    Folders that belong to a job are not searched, nor are links to folders. A job or a folder that
    cannot be read is an entry that says so.

    Raises:
        UserError: If the root cannot be opened.
    """
    store = open_store(root, storage)
    found: list[JobStatus] = []
    # A stack: folders nest deeper than Python's calls.
    folders = [""]
    while folders:
        jobs, children = _look_into(store, folders.pop(), storage)
        found += jobs
        folders += children
    return sorted(found, key=lambda job: job.url)


def _look_into(
    store: Store, folder: str, storage: StorageOptions
) -> tuple[list[JobStatus], list[str]]:
    """The job in a folder, if there is one or one may be, and the folders where more may be."""
    prefix = f"{folder}/" if folder else ""
    url = join_url(store.url, folder) if folder else store.url
    try:
        is_job = store.head(f"{prefix}{JOB_KEY}") is not None
        children = [] if is_job else list(store.list_folders(prefix, follow_links=False))
    except StorageError as error:
        if not folder:
            message = f"cannot search {error}"
            raise UserError(message) from None
        return [_unreadable(url, error)], []
    if is_job:
        return [_status_or_problem(url, storage)], []
    return [], [child for child in children if _may_hold_jobs(child.rpartition("/")[2])]


def _may_hold_jobs(name: str) -> bool:
    return not f"{name}/".startswith(OWN_PREFIXES) and not name.startswith(".")


def _status_or_problem(url: str, storage: StorageOptions) -> JobStatus:
    try:
        return job_status(url, storage)
    except Segformer3dError as error:
        return _unreadable(url, error)


def _unreadable(url: str, error: Exception) -> JobStatus:
    return JobStatus(
        url=url,
        state="unreadable",
        trained=False,
        quarantined={},
        problem=one_line(str(error)),
    )


def _unplanned(alive: tuple[Heartbeat, ...]) -> JobState:
    if not alive:
        return "interrupted"
    return "submitted" if all(item.state == "submitted" for item in alive) else "planning"
