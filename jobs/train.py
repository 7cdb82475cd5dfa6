"""The verb ``train``: a recipe, a folder, and the way back to where it was stopped."""

import contextlib
import fcntl
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from jobs.progress import Progress, say
from jobs.train_rank import TrainRequest, load, make_trainer, plain_errors
from pipeline.errors import UserError

_LOCK_NAME = ".lock"


@dataclass(frozen=True)
class TrainReport:
    """What a run of a training came to.

    Attributes:
        outcome: ``done``; ``stopped`` by the time limit; ``interrupted`` by a signal.
        step: Steps done, over all runs.
        num_steps: Steps of the recipe.
        minutes: Time spent training, over all runs.
        best: Largest sum of the chosen metrics so far.
        metrics: The last validation.
        weights: The best weights, or the last if the recipe does not say what is best; None if
            there are none yet.
        go_on: The command that goes on; None when there is nothing left to do.
        is_first: Whether this process speaks for all.
    """

    outcome: Literal["done", "stopped", "interrupted"]
    step: int
    num_steps: int
    minutes: float
    best: float | None
    metrics: dict[str, float]
    weights: str | None
    go_on: str | None
    is_first: bool = True

    def text(self) -> str:
        """For a person."""
        if self.num_steps == 0:
            return "interrupted: what was saved before is as it was"
        lines = [f"{self.outcome}: {self.step} of {self.num_steps} steps, {self.minutes:.1f} min"]
        lines += [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        lines += [self.weights] if self.weights else []
        return "\n".join(lines)


def train(request: TrainRequest) -> TrainReport:
    """Train, or go on with the training in the output folder.

    Raises:
        UserError: The recipe, a data set, the weights or the folder cannot be used.
        JobError: The training cannot go on; its last checkpoint is kept.
    """
    load(request)
    if request.num_workers < 1:
        message = f"--num-workers {request.num_workers}: at least 1"
        raise UserError(message)
    if request.max_minutes is not None and not request.max_minutes > 0:
        message = f"--max-minutes {request.max_minutes}: more than 0"
        raise UserError(message)
    folder = _folder(request.output)
    is_first = os.environ.get("RANK", "0") == "0"
    with (
        _locked(folder) if is_first else contextlib.nullcontext(),
        _Signals() as signals,
    ):
        try:
            if request.num_workers > 1:
                outcome = _train_together(request, signals)
            else:
                outcome = _train_here(request, signals, is_first=is_first)
        except KeyboardInterrupt:
            # Before the first step, or for the second time: what is saved is as it was.
            outcome, signals.count = {"step": 0, "num_steps": 0}, 1
    return _report(request, outcome, interrupted=signals.count > 0, is_first=is_first)


def _train_here(request: TrainRequest, signals: "_Signals", *, is_first: bool) -> dict[str, Any]:
    """Train in this process; under torchrun together with the others."""
    from segformer3d.memory import keep_freed_buffers

    keep_freed_buffers()
    from segformer3d.collective import joined_by_environment

    with plain_errors(), joined_by_environment(request.device) as device:
        trainer = make_trainer(request, device)
        done, total = trainer.progress.step, trainer.recipe.num_steps
        if is_first and done:
            say(f"Going on after step {done} of {total}.")
        signals.is_draining = True
        with _bar(done, total) if is_first else contextlib.nullcontext() as bar:
            outcome = trainer.run(
                max_minutes=request.max_minutes,
                should_stop=lambda: signals.count > 0,
                report=lambda step, values: _note(bar, step, values),
                on_step=lambda step: None if bar is None else bar.advance(1),
            )
    return vars(outcome)


def _train_together(request: TrainRequest, signals: "_Signals") -> dict[str, Any]:
    from jobs.train_ray import train_on_ray

    say(f"Starting Ray and {request.num_workers} workers; the first step takes a while.")
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def watch(step: int, total: int, values: Mapping[str, float]) -> None:
            if not bars:
                signals.listen()  # Ray took the signals over when it started
                signals.is_draining = True
                bars.append(stack.enter_context(_bar(step, total)))
            bars[0].advance(max(0, step - bars[0].done))
            _note(bars[0], step, values)

        return train_on_ray(request, should_stop=lambda: signals.count > 0, watch=watch)


def _bar(done: int, total: int) -> Progress:
    return Progress("training", total, done=done, unit="steps")


def _note(bar: Progress | None, step: int, values: Mapping[str, float]) -> None:
    """Show losses beside the bar, and what a validation gave on a line of its own."""
    if bar is None:
        return
    shown = {name: f"{value:.4g}" for name, value in values.items()}
    bar.advance(0, **{name: value for name, value in shown.items() if "." not in name})
    measured = ", ".join(f"{name} {value}" for name, value in shown.items() if "." in name)
    if measured:
        say(f"step {step}: {measured}")


def _report(
    request: TrainRequest, outcome: Mapping[str, Any], *, interrupted: bool, is_first: bool
) -> TrainReport:
    from segformer3d.training import BEST_NAME, LAST_NAME

    complete = outcome["num_steps"] and outcome["step"] >= outcome["num_steps"]
    folder = Path(request.output)
    found = [folder / name for name in (BEST_NAME, LAST_NAME) if (folder / name).exists()]
    words = ["segformer3d", "train", request.config, "--output", request.output]
    words += [] if request.num_workers == 1 else ["--num-workers", str(request.num_workers)]
    words += [] if request.device is None else ["--device", request.device]
    words += [word for item in request.overrides for word in ("--set", item)]
    return TrainReport(
        outcome="done" if complete else "interrupted" if interrupted else "stopped",
        step=outcome["step"],
        num_steps=outcome["num_steps"],
        minutes=outcome.get("minutes", 0.0),
        best=outcome.get("best"),
        metrics=dict(outcome.get("metrics", {})),
        weights=str(found[0]) if found else None,
        go_on=None if complete else shlex.join(words),
        is_first=is_first,
    )


def _folder(output: str) -> Path:
    if "://" in output:
        message = f"{output}: a training writes to a local folder, which all its workers share"
        raise UserError(message)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{output}: cannot make the folder: {error.strerror or error}"
        raise UserError(message) from None
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One training at a time in a folder; the lock goes with the process, however it ends."""
    try:
        with (folder / _LOCK_NAME).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        message = f"{folder}: another training is at work in this folder"
        raise UserError(message) from None
    except PermissionError as error:
        message = f"{error.filename or folder}: {error.strerror}"
        raise UserError(message) from None


class _Signals:
    """Counts SIGINT and SIGTERM: the first lets the step end, the second stops at once.

    Attributes:
        count: How many came.
        is_draining: Whether there is a step to end; before that the first stops at once too.
    """

    def __init__(self) -> None:
        self.count = 0
        self.is_draining = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            names = (signal.SIGINT, signal.SIGTERM)
            self._before = {name: signal.getsignal(name) for name in names}
            self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def listen(self) -> None:
        """Take the signals over; again after something else did."""
        for name in self._before:
            signal.signal(name, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1 or not self.is_draining:
            raise KeyboardInterrupt
        say("Stopping after this step; once more stops at once.")
