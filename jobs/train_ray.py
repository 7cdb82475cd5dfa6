"""A training over several processes, each a worker of Ray Train with torch.distributed in it."""

import contextlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from jobs.cluster import Cluster, connect
from jobs.spec import RaySection
from jobs.train_rank import TrainRequest, make_trainer, plain_errors, variables_of
from pipeline.errors import JobError, UserError

_POLL_S = 0.5
_SCRATCH = ".ray"

Watch = Callable[[int, int, Mapping[str, float]], None]


def train_on_ray(
    request: TrainRequest, *, should_stop: Callable[[], bool], watch: Watch
) -> dict[str, Any]:
    """Train with ``num_workers`` processes, on the cluster of RAY_ADDRESS or an embedded one.

    The global batch is shared out among them. The first writes the checkpoint, so the output must
    be a folder that all of them see.

    Args:
        request: What to do.
        should_stop: Asked twice a second; the workers then finish their step and stop.
        watch: Told the steps done, the steps of the recipe, and losses or a validation.

    Returns:
        The fields of ``segformer3d.training.Outcome``.

    Raises:
        UserError: The recipe or a data set cannot be used.
        JobError: A worker failed; the last checkpoint is kept.
    """
    folder = Path(request.output).absolute()
    scratch = folder / _SCRATCH / uuid4().hex
    scratch.mkdir(parents=True)
    _set_environment()
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    settings = RaySection(num_cpus=max(request.num_workers, cores or 1))
    try:
        with connect(settings) as cluster:
            return _fit(request, cluster, scratch, should_stop, watch)
    finally:
        shutil.rmtree(folder / _SCRATCH, ignore_errors=True)


def _set_environment() -> None:
    """Keep Ray Train's files, folders and words to itself; before it is imported."""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths of data sets are relative to our folder
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    # The workers of an embedded cluster meet on loopback.
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def _fit(
    request: TrainRequest,
    cluster: Cluster,
    scratch: Path,
    should_stop: Callable[[], bool],
    watch: Watch,
) -> dict[str, Any]:
    """Run the workers in a thread: in the main one Ray Train would take the signals over."""
    trainer = _torch_trainer(request, cluster, scratch)
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit())
        except BaseException as error:  # noqa: BLE001  raised again in the main thread
            ended.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    text = ""
    while thread.is_alive():
        thread.join(_POLL_S)
        if should_stop():
            _stop_file(scratch).touch()
        with contextlib.suppress(OSError):
            text, before = _progress_file(scratch).read_text(), text
            if text != before:
                seen = json.loads(text)
                watch(seen["step"], seen["total"], seen["values"])
    if isinstance(ended[0], BaseException):
        raise _plain(ended[0])
    outcome: dict[str, Any] = json.loads(_outcome_file(scratch).read_text())
    return outcome


def _torch_trainer(request: TrainRequest, cluster: Cluster, scratch: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.backend import Backend
        from ray.train.torch import TorchConfig, TorchTrainer

        class LeftToTheWorkers(TorchConfig):
            """Joins nobody."""

            @property
            def backend_cls(self) -> Any:
                return Backend

        wants_gpu = request.device is None or request.device.startswith("cuda")
        use_gpu = wants_gpu and cluster.num_gpus >= request.num_workers
        joining = LeftToTheWorkers if cluster.embedded else TorchConfig
        return TorchTrainer(
            train_worker,
            train_loop_config={
                "request": asdict(request) | {"output": str(Path(request.output).absolute())},
                "scratch": str(scratch),
                "folder": str(Path.cwd()),
                "variables": variables_of(request),
                "use_gpu": use_gpu,
                "meet_in": str(scratch / "meeting") if cluster.embedded else None,
            },
            torch_config=joining(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=request.num_workers, use_gpu=use_gpu),
            run_config=RunConfig(
                name="train",
                storage_path=str(scratch),
                failure_config=FailureConfig(max_failures=0),
            ),
        )


def train_worker(config: dict[str, Any]) -> None:
    """Train as one of Ray Train's workers."""
    from segformer3d.memory import keep_freed_buffers

    keep_freed_buffers()
    from ray import train
    from ray.train.torch import get_device

    os.environ.update(config["variables"])
    with contextlib.suppress(OSError):
        os.chdir(config["folder"])
    request, scratch = TrainRequest(**config["request"]), Path(config["scratch"])
    speaker = _Speaker(scratch, is_first=train.get_context().get_world_rank() == 0)
    with plain_errors(), _joined(config["meet_in"], on_gpus=config["use_gpu"]):
        trainer = make_trainer(request, get_device() if config["use_gpu"] else "cpu")
        speaker.first(trainer.progress.step, trainer.recipe.num_steps)
        outcome = trainer.run(
            max_minutes=request.max_minutes,
            should_stop=speaker.should_stop,
            report=speaker.report,
            on_step=speaker.step,
        )
    if speaker.is_first:
        _outcome_file(scratch).write_text(json.dumps(asdict(outcome)))


@contextlib.contextmanager
def _joined(meet_in: str | None, *, on_gpus: bool) -> Iterator[None]:
    """Join torch.distributed, unless Ray Train has done so."""
    if meet_in is None:
        yield
        return
    from ray import train

    from segformer3d.collective import joined_by_file

    context = train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    with joined_by_file(Path(meet_in), rank, num_ranks, on_gpus=on_gpus):
        yield


class _Speaker:
    """Tells the driver how far the workers are, and hears when to stop, through small files."""

    def __init__(self, scratch: Path, *, is_first: bool) -> None:
        self._progress, self._stop = _progress_file(scratch), _stop_file(scratch)
        self.is_first = is_first
        self._total = 0
        self._told = self._looked = time.monotonic()

    def first(self, step: int, total: int) -> None:
        self._total = total
        self._write(step)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, values)

    def step(self, step: int) -> None:
        if time.monotonic() - self._told > _POLL_S:
            self._write(step)

    def should_stop(self) -> bool:
        if time.monotonic() - self._looked < _POLL_S:
            return False
        self._looked = time.monotonic()
        return self._stop.exists()

    def _write(self, step: int, values: Mapping[str, float] | None = None) -> None:
        self._told = time.monotonic()
        if not self.is_first:
            return
        temporary = self._progress.with_suffix(".part")
        fields = {"step": step, "total": self._total, "values": dict(values or {})}
        temporary.write_text(json.dumps(fields))
        temporary.replace(self._progress)


def _progress_file(scratch: Path) -> Path:
    return scratch / "progress.json"


def _outcome_file(scratch: Path) -> Path:
    return scratch / "outcome.json"


def _stop_file(scratch: Path) -> Path:
    return scratch / "stop"


def _plain(error: BaseException) -> BaseException:
    """Find the error of ours that a worker raised; the others' are of its leaving them alone."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [cause for failure in failures for cause in _chain(failure)]
    for kind in (UserError, JobError):
        for cause in causes:
            if isinstance(cause, kind):
                return kind(str(cause))
    if not isinstance(error, Exception):
        return error
    lines = str(causes[0]).strip().splitlines() or [type(causes[0]).__name__]
    return JobError(f"a training worker failed, the last checkpoint is kept: {lines[-1]}")


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__
    return found
