"""Training: the loop, its checkpoints and its best weights; plain torch, any number of ranks.

A checkpoint holds everything that the rest of a training depends on; chance follows from the seed
and the step alone, so a killed training that goes on ends with the same bits (on CPUs; the sums
of some CUDA kernels depend on the order in which their threads finish).
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import cv2
import torch
from torch import Tensor, nn

from segformer3d.batches import Batch, Mixture, open_sources
from segformer3d.checkpoint import read_checkpoint, reason, write_checkpoint
from segformer3d.collective import any_of, rank, sum_gradients
from segformer3d.config import (
    IMAGENET_PREPROCESSING,
    ORIGIN_PREPROCESSING,
    WeightsInfo,
)
from segformer3d.datasets import DatasetError, open_dataset
from segformer3d.network import input_affine
from segformer3d.objective import Objective
from segformer3d.optim import MovingAverage, make_optimizer, momentum_at, rate_at
from segformer3d.recipe import Recipe, RecipeError, codec_of, expanded
from segformer3d.start import model_at_start, read_weights
from segformer3d.teaching import Lessons, Teacher
from segformer3d.training_log import TrainingLog
from segformer3d.validation import Validation
from segformer3d.weights import save_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from pathlib import Path

    from segformer3d.datasets import SampleSource
    from segformer3d.model import Segformer3D

CHECKPOINT_NAME = "checkpoint.pt"
BEST_NAME = "best.safetensors"
LAST_NAME = "last.safetensors"
LOG_EVERY_STEPS = 10
NOT_MEASURED: Mapping[str, float] = {}


class DivergedError(FloatingPointError):
    """The loss or a gradient is not finite any more; the last checkpoint is kept."""


@dataclass
class Progress:
    """How far a training is; saved in its checkpoint.

    Attributes:
        step: Steps done.
        best: Largest sum of the chosen metrics so far.
        minutes: Time spent training.
    """

    step: int = 0
    best: float = float("-inf")
    minutes: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a run of a training came to.

    Attributes:
        step: Steps done, of `num_steps`.
        num_steps: Steps of the whole recipe.
        best: The best sum of the chosen metrics; None before the first validation.
        metrics: The last validation.
        folder: Where the weights and the logs are.
        minutes: Time spent training, over all runs.
    """

    step: int
    num_steps: int
    best: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    folder: str = ""
    minutes: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.num_steps


class Trainer:
    """One rank's part of a training.

    Attributes:
        recipe: With its epochs as steps.
        progress: How far it is.
        model: The network that learns.
        average: Its moving average, which is what is measured and saved; None without one.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        device: str | torch.device | None = None,
        open_source: Callable[[str], SampleSource] = open_dataset,
    ) -> None:
        """Set a training up, or take it up where its checkpoint left it.

        Args:
            recipe: All of it.
            folder: Where checkpoint, weights and logs go, seen by all ranks; a checkpoint there
                is gone on from.
            device: Where to train; the GPU if there is one.
            open_source: Opens data sets by address.

        Raises:
            RecipeError: The checkpoint is damaged or belongs to another recipe, the weights or
                the data sets do not fit.
            DatasetError: A data set cannot be opened.
        """
        self.folder = folder
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        sources = open_sources(recipe, open_source)
        self._lengths = [len(source) for source in sources]
        self.recipe = recipe = recipe.resolved(self._lengths)
        self.mixture = Mixture(recipe, sources)
        path = folder / CHECKPOINT_NAME
        state = read_checkpoint(path, recipe.identity(), self._lengths, self.device)
        self.model = model_at_start(recipe, state).to(self.device)
        self.info = _info(recipe, self.model)
        for name in recipe.freeze:
            _part(self.model, name).requires_grad_(requires_grad=False)
        self.objective = Objective(recipe, _lessons(recipe, self.model)).to(self.device)
        learned = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, learned, recipe.optimizer)
        self.average = MovingAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None
        validated = {
            name: open_source(expanded(address, f"validation.datasets.{name}"))
            for name, address in recipe.validation.datasets.items()
        }
        self._validation = Validation(recipe, validated, self.objective, self.info, self.device)
        self.progress = Progress()
        self.metrics: dict[str, float] = {}
        self._scale, self._bias = input_affine(self.info.preprocessing, self.device)
        if state is not None:
            self._restore(state)

    def run(
        self,
        *,
        max_minutes: float | None = None,
        max_steps: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        report: Callable[[int, Mapping[str, float]], None] = lambda _step, _values: None,
        on_step: Callable[[int], None] = lambda _step: None,
    ) -> Outcome:
        """Train until the recipe's end or until told to stop; the checkpoint is then there.

        Args:
            max_minutes: Stop after so many minutes of this run.
            max_steps: Stop after so many steps of this run.
            should_stop: Asked after each step; all ranks stop when one is told to.
            report: Told the losses every few steps, and what a validation gave.
            on_step: Told each step.

        Raises:
            DivergedError: The loss or a gradient is not finite.
            RecipeError: A metric of `validation.best` was not measured.
        """
        started = saved = time.monotonic()
        before, first_step = self.progress.minutes, self.progress.step
        with (
            TrainingLog(self.folder, after_step=first_step, active=rank() == 0) as log,
            closing(self._batches()) as batches,
        ):
            for batch in batches:
                values = self._step(batch)
                now = time.monotonic()
                step = self.progress.step = self.progress.step + 1
                self.progress.minutes = before + (now - started) / 60
                on_step(step)
                if step % LOG_EVERY_STEPS == 0 or step == len(self.mixture):
                    self._tell(step, values, log, report)
                due = now - saved > 60 * self.recipe.checkpoint_minutes
                if self._validation.is_due(step, len(self.mixture)):
                    self._validate()
                    self._tell(step, self.metrics, log, report)
                    due = True
                late = max_minutes is not None and now - started > 60 * max_minutes
                enough = max_steps is not None and step - first_step >= max_steps
                save, stop = any_of([due, late or enough or should_stop()], self.device)
                if stop:
                    break
                if save:
                    self._save_checkpoint()
                    saved = time.monotonic()
            self._save_checkpoint()
            self._save_weights(LAST_NAME)
        return self.outcome()

    def _tell(
        self,
        step: int,
        values: Mapping[str, Tensor | float],
        log: TrainingLog,
        report: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        shown = {name: float(value) for name, value in values.items()}
        log.write(step, shown)
        if values is self.metrics:
            log.draw()
        report(step, shown)

    def outcome(self) -> Outcome:
        """Say how far the training is."""
        best = self.progress.best
        return Outcome(
            step=self.progress.step,
            num_steps=self.recipe.num_steps,
            best=None if best == float("-inf") else best,
            metrics=self.metrics,
            folder=str(self.folder),
            minutes=self.progress.minutes,
        )

    def _step(self, batch: Batch) -> dict[str, Tensor | float]:
        step = self.progress.step
        # All ranks draw alike, and anew at each step: see `collective`.
        torch.manual_seed((self.recipe.seed << 32) + step)
        rate = self._set_rate(step)
        self._train_mode()
        batch = batch.to(self.device)
        x_bchw = torch.addcmul(self._bias, batch.image.float(), self._scale)
        with self._autocast():
            maps = self.model.forward_features(x_bchw)
            outputs = self.model.forward_heads(maps)
        loss, values = self.objective(maps, outputs, batch, x_bchw)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        sum_gradients(learned)
        gradients = [p.grad for p in learned if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # Looked at before the step is taken, so that no checkpoint can hold what came of it. All
        # ranks see the same numbers: those over all ranks.
        if not torch.isfinite(torch.stack([*values.values(), norm])).all():
            raise DivergedError(
                f"the loss is not finite at step {step}: lower optimizer.rate or set clip_norm; "
                f"the last checkpoint is kept in {self.folder}"
            )
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(learned, self.recipe.clip_norm, norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, step)
        return {**values, "rate": rate}

    def _set_rate(self, step: int) -> float:
        options, num_steps = self.recipe.schedule, self.recipe.num_steps
        rate = self.recipe.optimizer.rate * rate_at(step, num_steps, options)
        momentum = momentum_at(step, num_steps, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
            if momentum is not None:
                group["betas"] = (momentum, group["betas"][1])
        return rate

    def _train_mode(self) -> None:
        """Frozen parts stay as they are, their batch norms too."""
        self.model.train()
        self.objective.train()
        for name in self.recipe.freeze:
            _part(self.model, name).eval()

    def _autocast(self) -> Any:
        if self.recipe.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _batches(self) -> Generator[Batch]:
        steps = range(self.progress.step, len(self.mixture))
        if self.recipe.loader_workers == 0:
            yield from (self.mixture[step] for step in steps)
            return
        loader = torch.utils.data.DataLoader(
            self.mixture,
            batch_size=None,
            sampler=list(steps),
            num_workers=self.recipe.loader_workers,
            # A forked process would inherit the locks of threads that it does not have.
            multiprocessing_context="spawn",
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_prepare_loader,
        )
        try:
            yield from loader
        except DatasetError as error:
            # The loader puts the worker's whole traceback into the message.
            line = str(error).strip().splitlines()[-1]
            raise DatasetError(line.partition("DatasetError: ")[2] or line) from None

    def _validate(self) -> None:
        """Measure the averaged model, and keep it if it is the best so far."""
        self.metrics = self._validation.measure(self._averaged)
        score = self._validation.score(self.metrics)
        if score is not None and score > self.progress.best:
            self.progress.best = score
            self._save_weights(BEST_NAME, quality=self.metrics)

    @property
    def _averaged(self) -> Segformer3D:
        return self.model if self.average is None else self.average.model

    def _save_weights(self, name: str, quality: Mapping[str, float] = NOT_MEASURED) -> None:
        if rank() == 0:
            measured = {name: value for name, value in quality.items() if math.isfinite(value)}
            info = replace(self.info, quality=measured)
            save_weights(self.folder / name, self._averaged, info)

    def _save_checkpoint(self) -> None:
        if rank() != 0:
            return
        state = {
            "recipe": self.recipe.identity(),
            "config": self.model.config.to_dict(),
            "lengths": self._lengths,
            "best_of": list(self.recipe.validation.best),
            "progress": vars(self.progress),
            "metrics": self.metrics,
            "model": self.model.state_dict(),
            "objective": self.objective.learned_state(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        write_checkpoint(self.folder / CHECKPOINT_NAME, state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.objective.load_learned_state(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.model.load_state_dict(state["average"])
            self.progress = Progress(**state["progress"])
            self.metrics = state["metrics"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"{self.folder / CHECKPOINT_NAME}: of another version, remove it to start anew: "
                f"{reason(error)}"
            ) from None
        best_of = list(self.recipe.validation.best)
        if state.get("best_of", best_of) != best_of:
            self.progress.best = float("-inf")


def _info(recipe: Recipe, model: Segformer3D) -> WeightsInfo:
    known = {"imagenet": IMAGENET_PREPROCESSING, "origin": ORIGIN_PREPROCESSING}
    return WeightsInfo(
        config=model.config,
        preprocessing=known[recipe.preprocessing],
        depth_codec=codec_of(recipe),
        training_data=recipe.training_data,
        short_side_px=recipe.short_side_px,
        terms=recipe.terms,
    )


def _lessons(recipe: Recipe, model: Segformer3D) -> Lessons | None:
    if recipe.teacher is None:
        return None
    teacher = Teacher(read_weights(recipe.teacher.weights, "teacher.weights"))
    return Lessons(recipe.teacher, teacher, model.encoder.embed_dims, recipe.seed)


def _part(model: Segformer3D, name: str) -> nn.Module:
    part = getattr(model, name)
    if not isinstance(part, nn.Module):
        raise RecipeError(f"freeze: the model has no {name}")
    return part


def _prepare_loader(_worker: int) -> None:
    cv2.setNumThreads(1)
    # Ctrl-C reaches the whole process group; the trainer decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
