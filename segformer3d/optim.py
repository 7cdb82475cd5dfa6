"""The optimiser, its rate over time, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = options.weight_decay if parameter.ndim > 1 else 0.0
            key = (rate_factor(name, model, options), decay)
            groups.setdefault(key, []).append(parameter)
    if extra:
        groups.setdefault((1.0, 0.0), []).extend(extra)
    parameters = [
        {"params": members, "rate_factor": factor, "weight_decay": decay, "lr": options.rate}
        for (factor, decay), members in groups.items()
    ]
    kind = torch.optim.AdamW if options.kind == "adamw" else torch.optim.Adam
    return kind(parameters, lr=options.rate, betas=options.betas)


def rate_factor(name: str, model: Segformer3D, options: OptimizerSection) -> float:
    """Return the share of the rate that a parameter of this name learns with.

    The last stage of a Mix Transformer learns at the full rate, each one before it at
    `layer_decay` of the next one's (as Clark et al. 2020, arXiv 2003.10555, did for language
    models); a timm encoder learns at the full rate as a whole.

    Args:
        name: As in the model's state dict.
        model: The network.
        options: The recipe's.
    """
    if not name.startswith("encoder."):
        return options.head_rate_factor
    stages = len(getattr(model.encoder, "stages", ()))
    if stages == 0:
        return 1.0
    stage = int(name.split(".")[2])
    return float(options.layer_decay ** (stages - 1 - stage))


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
