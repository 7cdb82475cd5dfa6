"""The optimiser, its rate over time, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from segformer3d.encoder import REDUCTIONS

if TYPE_CHECKING:
    from segformer3d.model import Segformer3D
    from segformer3d.recipe import OptimizerSection, ScheduleSection

WARM_UP_START = 1e-3  # share of the full rate at step 0
ONE_CYCLE_FINAL_DIV = 1e4


def make_optimizer(
    model: Segformer3D, extra: list[nn.Parameter], options: OptimizerSection
) -> torch.optim.Optimizer:
    """Build the optimiser over what is not frozen; the depth of a layer sets its rate.

    Norms and biases do not decay. Each group keeps its own `rate_factor`.

    Args:
        model: The network.
        extra: Parameters besides the network's, learned at the full rate without decay.
        options: The recipe's.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    factors = _rate_factors(model, options)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = options.weight_decay if parameter.ndim > 1 else 0.0
            key = (factors[name], decay)
            groups.setdefault(key, []).append(parameter)
    if extra:
        groups.setdefault((1.0, 0.0), []).extend(extra)
    parameters = [
        {"params": members, "rate_factor": factor, "weight_decay": decay, "lr": options.rate}
        for (factor, decay), members in groups.items()
    ]
    kind = torch.optim.AdamW if options.kind == "adamw" else torch.optim.Adam
    return kind(parameters, lr=options.rate, betas=options.betas)


def _rate_factors(model: Segformer3D, options: OptimizerSection) -> dict[str, float]:
    """Map each learned parameter's name to the share of the rate that it learns with.

    What the deepest map alone depends on learns at the full rate, each stage before it at
    `layer_decay` of the next one's (as Clark et al. 2020, arXiv 2003.10555, did for language
    models).
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors = {
        name: 1.0 if name.startswith("encoder.") else options.head_rate_factor for name in names
    }
    if options.layer_decay < 1:
        for name, stage in stages_of(model.encoder).items():
            factors[f"encoder.{name}"] = options.layer_decay ** (len(REDUCTIONS) - 1 - stage)
    return factors


def stages_of(encoder: nn.Module) -> dict[str, int]:
    """Map each learned parameter's name to the shallowest of the four maps that depends on it.

    Asked of autograd, so it holds for any encoder; a parameter that no map depends on is left out.
    """
    learned = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    if not learned:
        return {}
    was_training = encoder.training
    encoder.eval()
    side = 2 * REDUCTIONS[-1]
    device = next(iter(learned.values())).device
    with torch.enable_grad():
        maps = encoder(torch.zeros(1, 3, side, side, device=device))
    encoder.train(was_training)
    stages: dict[str, int] = {}
    for stage, map_ in enumerate(maps):
        if map_.requires_grad:
            parameters = list(learned.values())
            found = torch.autograd.grad(
                map_.sum(), parameters, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(learned, found, strict=True):
                if gradient is not None:
                    stages.setdefault(name, stage)
    return stages


def rate_at(step: int, num_steps: int, options: ScheduleSection) -> float:
    """Return the share of the full rate at a step, 0 to `num_steps` - 1.

    `poly` warms up linearly and falls as (1 - t)^power; `onecycle` (Smith 2018, arXiv 1708.07120)
    rises and falls as cosines, as torch's `OneCycleLR` does.
    """
    if options.kind == "constant":
        return 1.0
    if options.kind == "onecycle":
        start = 1 / options.start_div
        return _one_cycle(step, num_steps, options.rise, (start, 1.0, start / ONE_CYCLE_FINAL_DIV))
    if step < options.warm_up_steps:
        return WARM_UP_START + (1 - WARM_UP_START) * step / options.warm_up_steps
    left = 1 - (step - options.warm_up_steps) / max(1, num_steps - options.warm_up_steps)
    return max(options.floor, math.pow(left, options.power))


def momentum_at(step: int, num_steps: int, options: ScheduleSection) -> float | None:
    """Return the first beta at a step; None where the schedule leaves it alone."""
    if options.kind != "onecycle" or options.momentum is None:
        return None
    least, most = options.momentum
    return _one_cycle(step, num_steps, options.rise, (most, least, most))


def _one_cycle(step: int, num_steps: int, rise: float, values: tuple[float, float, float]) -> float:
    """Go from the first value to the second in the share `rise` of the steps, then to the third."""
    top = rise * num_steps - 1
    if top > 0 and step <= top:
        return _cosine(values[0], values[1], step / top)
    top = max(top, 0.0)
    return _cosine(values[1], values[2], (step - top) / max(1e-9, num_steps - 1 - top))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


class MovingAverage:
    """An exponential moving average of a model's parameters and statistics.

    Attributes:
        model: The averaged model, in eval mode.
        decay: Share of the old average that each step keeps, once the average has settled.
    """

    def __init__(self, model: Segformer3D, decay: float) -> None:
        """Start from a copy of the model."""
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Segformer3D, step: int) -> None:
        """Move towards the model; early steps move faster.

        Args:
            model: As it is after the step.
            step: Steps done before this one.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        state = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                ours.append(average)
                theirs.append(state[name])
            else:
                average.copy_(state[name])
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged model's state."""
        return self.model.state_dict()
