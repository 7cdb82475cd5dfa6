"""What a training measures on the way, and what makes weights the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from segformer3d.augment import resized
from segformer3d.batches import batch_of
from segformer3d.collective import alone, gather, rank, world_size
from segformer3d.evaluation import measure
from segformer3d.geometry import Geometry, input_size, short_side_of
from segformer3d.metrics import ConfusionMatrix, DepthErrors
from segformer3d.network import input_affine
from segformer3d.objective import LossSums
from segformer3d.predictor import Predictor
from segformer3d.recipe import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from segformer3d.config import WeightsInfo
    from segformer3d.datasets import SampleSource
    from segformer3d.model import Segformer3D
    from segformer3d.objective import Objective
    from segformer3d.recipe import Recipe, ValidationSection


NO_METRICS = {"iou", "counts", "pixels", "missing", "min_m", "max_m"}


class Validation:
    """The data sets of a recipe's validation, and how to measure a model on them."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[str, SampleSource],
        objective: Objective,
        info: WeightsInfo,
        device: torch.device,
    ) -> None:
        """Prepare to measure.

        Args:
            recipe: All of it.
            sources: The opened data sets, by the names that their metrics carry.
            objective: For the losses, if the recipe asks for them.
            info: What belongs to the model.
            device: Where the model is.

        Raises:
            RecipeError: There is no such metric as `best` names.
        """
        self._options = recipe.validation
        self._side = recipe.short_side_px
        self._sources = sources
        self._objective = objective
        self._info = info
        self._device = device
        self._affine = input_affine(info.preprocessing, device)
        _check_names(self._options)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to measure after so many steps."""
        if not self._sources:
            return False
        return step % self._options.every_steps == 0 or step == num_steps

    def measure(self, model: Segformer3D) -> dict[str, float]:
        """Measure a model, which is put in eval mode; each rank takes its share of the frames.

        Returns:
            Numbers by `NAME.METRIC`, the same on each rank.
        """
        metrics: dict[str, float] = {}
        for name, source in self._sources.items():
            number = min(self._options.limit or len(source), len(source))
            own = range(rank(), number, world_size())
            indices = [place * len(source) // number for place in own]
            for kind in zip(*gather(self._measure(model, source, indices)), strict=True):
                known = [part for part in kind if part is not None]
                for other in known[1:]:
                    known[0].merge(other)
                if known:
                    metrics |= _numbers(name, known[0].to_dict())
        return metrics

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Add up what makes weights the best; None if the recipe does not say what does.

        Raises:
            RecipeError: It was not measured.
        """
        names = self._options.best
        for name in names:
            if name.removeprefix("-") not in metrics:
                there = ", ".join(metrics) or "none"
                raise RecipeError(f"validation.best: no metric {name}; there are {there}")
        if not names:
            return None
        return sum(-metrics[name[1:]] if name[0] == "-" else metrics[name] for name in names)

    def _measure(
        self, model: Segformer3D, source: SampleSource, indices: Sequence[int]
    ) -> tuple[Any, ...]:
        predictor = Predictor(model, self._info, device=self._device)
        found = measure(predictor, source, indices, self._side, depth_codec=self._info.depth_codec)
        if not self._options.losses:
            return found
        # The ranks have different numbers of frames: none must wait for another.
        with alone():
            return (*found, self._losses(model, source, indices))

    @torch.no_grad()
    def _losses(self, model: Segformer3D, source: SampleSource, indices: Sequence[int]) -> LossSums:
        """Add the losses up over whole frames, each at the size at which it is measured."""
        sums = LossSums()
        geometry = Geometry(short_side_px=short_side_of(self._side))
        scale, bias = self._affine
        for index in indices:
            sample = source[index]
            height, width = sample.image.shape[:2]
            size_xy = input_size(width, height, geometry)
            batch = batch_of([resized(sample, size_xy[::-1])], [source.groups]).to(self._device)
            outputs = model(torch.addcmul(bias, batch.image.float(), scale))
            sums.update(self._objective.terms(outputs, batch))
        return sums


def _check_names(options: ValidationSection) -> None:
    known = {*ConfusionMatrix().to_dict(), *DepthErrors().to_dict()} - NO_METRICS
    for name in options.best:
        metric = name.rpartition(".")[2]
        if metric not in known and not metric.startswith("loss"):
            raise RecipeError(
                f"validation.best: {name}: metrics are {', '.join(sorted(known))}, and the losses"
            )


def _numbers(name: str, fields: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{name}.{key}": float(value)
        for key, value in fields.items()
        if key not in NO_METRICS and isinstance(value, int | float)
    }
