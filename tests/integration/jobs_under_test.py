"""Jobs for tests that kill: a small archive, the real command line as a process, what it left."""

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import psutil

from jobs.findings import Findings
from jobs.generations import GenerationView, History, read_plans
from jobs.lease import heartbeats
from jobs.plan import Plan, read_plan
from jobs.verify import verify_job
from pipeline.layout import PNG_PREFIX, Generation
from pipeline.sinks.parquet import read_rows
from pipeline.storage import StorageOptions, Store, open_store
from tests.media import encode_image, picture, write_video

GENERATION = Generation(0)
FRAME_SIZE = (192, 128)
VARIANT = "mit:16,32,80,128:1,2,2,1"
# One shard or so each: two clips with a keyframe every five frames, and stills.
FRAMES_PER_SHARD = 4
SETTINGS = ("geometry.short_side_px=64", f"shard.frames={FRAMES_PER_SHARD}")
# The other graph than one machine's own, so that both are tested.
STAGED = (*SETTINGS, "ray.graph=staged")
END_S = 240.0
# How long what can still commit may live on after its driver was killed: Ray's workers notice.
FATE_S = 30.0
# Workers that were just being started, or have nothing to do, look for their dead daemons for 20 to
# 60 s before they end.
LATE_FATE_S = 90.0
POLL_S = 0.05
_MARK = "SEGFORMER3D_TEST_RUN"
_HARMLESS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")

Row = tuple[str, str, str | None, str | None, str | None]


def make_archive(folder: Path, *, num_frames: int = 40, num_stills: int = 24) -> Path:
    """Two clips of ``num_frames`` each, and stills."""
    folder.mkdir(parents=True)
    for index in range(2):
        write_video(folder / f"clip-{index}.mp4", num_frames=num_frames, size=FRAME_SIZE, gop=5)
    for index in range(num_stills):
        still = folder / f"still-{index:03}.jpg"
        still.write_bytes(encode_image(picture(*FRAME_SIZE, index), "JPEG"))
    return folder


def add_bad_inputs(folder: Path) -> dict[str, tuple[int, str]]:
    """Three files that cannot be read; frame index and kind of their error, by name."""
    whole = encode_image(picture(*FRAME_SIZE, 99), "JPEG")
    (folder / "bad-cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bad-empty.mp4").write_bytes(b"")
    (folder / "bad-text.png").write_text("not a picture at all\n" * 50)
    return {
        "bad-cut.jpg": (0, "truncated"),
        "bad-empty.mp4": (-1, "truncated"),
        "bad-text.png": (-1, "corrupt"),
    }


def make_weights(path: Path) -> Path:
    """The smallest network that has all parts."""
    from segformer3d.weights import untrained_weights

    path.write_bytes(untrained_weights(VARIANT))
    return path


@dataclass(frozen=True, kw_only=True)
class JobUnderTest:
    """A job of the real command line, and a look at its folder.

    Attributes:
        archive: URL or path of the input.
        url: URL or path of the output.
        weights: The weights file.
        folder: A local place for what the processes print.
        settings: What ``--set`` is given.
        mark: What all processes of the job carry in their environment.
        module: What is run as the command line.
        environment: What its environment holds besides: where a cluster is, for one.
        started_in: The folder that it is started in, which Python shall not look into, as it does
            not for the installed command; None for this one.
    """

    archive: str
    url: str
    weights: Path
    folder: Path
    settings: tuple[str, ...] = SETTINGS
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    module: str = "jobs.cli"
    environment: Mapping[str, str] = field(default_factory=dict)
    started_in: Path | None = None

    @functools.cached_property
    def store(self) -> Store:
        """The job's folder, made if need be."""
        return open_store(self.url, create=True)

    def run(self, *extra: str) -> "Driver":
        """Start ``segformer3d run``."""
        arguments = ["run", "--input", self.archive, "--output", self.url]
        arguments += ["--weights", str(self.weights), "--json", *extra]
        for setting in self.settings:
            arguments += ["--set", setting]
        return self.start(arguments)

    def resume(self) -> "Driver":
        """Start ``segformer3d resume``."""
        return self.start(["resume", self.url, "--json"])

    def start(self, arguments: Sequence[str]) -> "Driver":
        """Start a driver as the leader of a process group, as a shell does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        out, err = self.folder / f"{name}.out", self.folder / f"{name}.err"
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        }
        own = {_MARK: self.mark, "RAY_TMPDIR": str(ray_folder(self.folder))}
        python = [sys.executable] if self.started_in is None else [sys.executable, "-P"]
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [*python, "-m", self.module, *arguments],
                cwd=self.started_in,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**inherited, **own, **self.environment},
                process_group=0,
            )
        return Driver(process=process, out=out, err=err)

    def processes(self) -> dict[int, str]:
        """Every living process of the job: drivers, Ray's daemons and workers, decoders."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark:
                    found[process.pid] = " ".join(process.cmdline())
            except psutil.Error:
                continue
        return found

    def workers(self) -> dict[int, str]:
        """Those that may yet do something to the job.

        Not Ray's workers that had no task when it died, nor its agents: one that was just starting
        takes up to a minute to notice that the node's head is gone.
        """
        return {
            pid: command
            for pid, command in self.processes().items()
            if "default_worker.py" not in command and not command.startswith(_HARMLESS)
        }

    def wait_until_idle(self) -> float:
        """Wait until nobody works on the job any more; says how many seconds it took."""
        started = time.monotonic()
        wait_for(lambda: not self.workers(), FATE_S, lambda: f"alive: {self.workers()}")
        return time.monotonic() - started

    def wait_until_gone(self) -> None:
        """Wait until no process of the job is left."""
        wait_for(lambda: not self.processes(), LATE_FATE_S, lambda: f"alive: {self.processes()}")

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Whatever happens within, end every process of the job, and only those."""
        try:
            yield
        finally:
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(ray_folder(self.folder), ignore_errors=True)

    def plan(self) -> Plan | None:
        """The plan, once there is one."""
        return read_plan(self.store, GENERATION)

    def commits(self) -> dict[str, bytes]:
        """Every commit record by its key, of all generations."""
        store = self.store
        folders = [generation.commit_prefix for generation, _ in read_plans(store)]
        keys = sorted(item.key for folder in folders for item in store.list(folder))
        return {key: store.read(key) for key in keys}

    def decided(self) -> frozenset[str]:
        """Keys of all that says that something is done, of all generations."""
        keys = (item.key for item in self.store.list())
        return frozenset(key for key in keys if _SAYS_DONE.fullmatch(key))

    def num_commits(self) -> int:
        """How many shards are decided."""
        return sum(1 for _ in self.store.list(GENERATION.commit_prefix))

    def exists(self, key: str) -> bool:
        """Whether an object is there."""
        return self.store.exists(key)

    def is_beating(self, pid: int) -> bool:
        """Whether the driver with this process id has given a sign of life."""
        return any(heartbeat.pid == pid for heartbeat in heartbeats(self.store))

    def unfinished_files(self) -> list[str]:
        """Files of a local job that no store would list: writes that were cut off."""
        if "://" in self.url:
            return []
        return [
            str(path.relative_to(self.url))
            for path in Path(self.url).rglob(".*")
            if not path.is_dir()
        ]

    def lacks_pngs(self) -> bool:
        """Whether a decided shard is not marked to have its pictures."""
        marked = sum(1 for _ in self.store.list(GENERATION.png_done_prefix))
        return marked < self.num_commits()

    def rows(self) -> list[Row]:
        """Every row that counts, of all generations, sorted."""
        views = History.load(self.store).views
        assert views
        return sorted(row for view in views for row in self._rows(view))

    def _rows(self, view: GenerationView) -> Iterator[Row]:
        for record in view.records:
            for file in record.files:
                data = self.store.read(f"{view.generation.prefix}{file.path}")
                for item in read_rows(data, _COLUMNS):
                    if view.counts(item["asset"], item["frame_index"]):
                        yield _row(item)

    def pngs(self) -> dict[str, str]:
        """Digest of every picture of the PNG tree."""
        store = self.store
        keys = [item.key for item in store.list(PNG_PREFIX)]
        return {key: _digest(data) for key, data in store.read_many(keys) if _is_data(data)}

    def _keep(self, keys: Iterable[str]) -> None:
        """Copies of objects that are wrong, which else would end with the S3 server."""
        for key in keys:
            kept = self.folder / "wrong" / key
            kept.parent.mkdir(parents=True, exist_ok=True)
            if self.exists(key):
                kept.write_bytes(self.store.read(key))

    def objects(self) -> set[str]:
        """Keys of everything below the generation."""
        return {item.key for item in self.store.list(GENERATION.prefix)}

    def verify(self) -> Findings:
        """What ``segformer3d verify`` finds."""
        return verify_job(self.url, StorageOptions())

    def check_sound(self) -> None:
        """Sound, complete, and without orphans."""
        findings = self.verify()
        self._keep(findings.bad_pngs)
        assert findings.is_sound, findings.faults
        assert findings.is_complete, findings.undecided
        assert findings.orphans == []
        assert findings.num_rows == findings.num_frames


_SAYS_DONE = re.compile(r"gen-\d+/(commit/.*|png-done/.*|_SUCCESS\.json)")
_COLUMNS = ["frame_id", "asset", "frame_index", "status", "error_kind", "class_ids", "depth"]


def _row(item: dict) -> Row:
    pictures = [item[name] and _digest(item[name]["bytes"]) for name in ("class_ids", "depth")]
    return item["frame_id"], item["status"], item["error_kind"] or "", pictures[0], pictures[1]


def _digest(data: bytes) -> str:
    """Of a PNG's pixels: equal ones are now and then deflated to other bytes (ARCHITECTURE)."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    said = f"{pixels.dtype} {pixels.shape} ".encode()
    return hashlib.sha256(said + pixels.tobytes()).hexdigest()


def _is_data(data: object) -> bool:
    if isinstance(data, Exception):
        raise data
    return True


@dataclass(frozen=True, kw_only=True)
class Driver:
    """One run of the command line.

    Attributes:
        process: It.
        out: What it prints.
        err: What it says.
    """

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return self.err.read_text(errors="replace")

    def end(self, timeout_s: float = END_S) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        """Signal the process alone."""
        self.process.send_signal(number)

    def send_group(self, number: signal.Signals) -> None:
        """Signal the whole process group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def result(self) -> dict:
        """What ``--json`` printed."""
        return json.loads(self.out.read_text())


def ray_folder(folder: Path) -> Path:
    """Where Ray keeps its sockets, whose paths may not be long."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    path = Path(tempfile.gettempdir(), f"s3d-{name}")
    path.mkdir(exist_ok=True)
    return path


def wait_for(
    happened: Callable[[], bool], timeout_s: float, story: Callable[[], str] = lambda: "too late"
) -> None:
    """Poll until something happened."""
    give_up = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < give_up, story()
        time.sleep(POLL_S)
