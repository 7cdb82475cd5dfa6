"""What a training minimises: the recipe's losses over one batch, added up over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from segformer3d.collective import all_sum, world_size
from segformer3d.labels import CLASS_NAMES
from segformer3d.layers import resize_bilinear
from segformer3d.losses import (
    DEPTH_LOSSES,
    UncertaintyWeights,
    cross_entropy,
    log_l1,
    merge_logits,
    outside_delta1,
    soft_jaccard,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from segformer3d.batches import Batch
    from segformer3d.model import DenseOutputs
    from segformer3d.recipe import Recipe
    from segformer3d.teaching import Lessons, Terms

SKY_ID = CLASS_NAMES.index("sky")


class Objective(nn.Module):
    """The recipe's losses; holds what is learned with them: the tasks' weights, the hints."""

    class_weights: Tensor | None

    def __init__(self, recipe: Recipe, lessons: Lessons | None = None) -> None:
        super().__init__()
        self.options = recipe.loss
        self.lessons = lessons
        weights = recipe.loss.class_weights
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights))
        tasks = {
            "classes": recipe.model.num_classes is not None and recipe.loss.classes > 0,
            "depth": recipe.model.has_depth and recipe.loss.depth > 0,
        }
        learned = recipe.loss.weighting == "uncertainty"
        self.uncertainty = UncertaintyWeights([t for t in tasks if tasks[t]]) if learned else None

    def learned_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the tasks' learned weights, and the hints."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if name.startswith(("uncertainty.", "lessons.hints."))
        }

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `learned_state` gave."""
        expected = self.learned_state()
        if state.keys() != expected.keys():
            raise ValueError("the losses' learned parameters are not those of the recipe")
        self.load_state_dict(state, strict=False)

    def forward(
        self, maps: Sequence[Tensor], outputs: DenseOutputs, batch: Batch, x_bchw: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give this rank's part of the loss, and each loss over all ranks for the log.

        The parts of all ranks add up to the loss of the whole batch. A loss of which the batch
        knows nothing is 0, and so is its gradient.

        Args:
            maps: The encoder's four, for this rank's samples.
            outputs: Of the network, for the same.
            batch: This rank's samples.
            x_bchw: The same, normalised, for the teacher.
        """
        terms = self.terms(outputs, batch)
        if self.lessons is not None:
            terms |= self.lessons(maps, outputs, batch.distil, x_bchw)
        losses = [loss for loss, _ in terms.values()]
        # One message for all: the weights over all ranks.
        weights = all_sum(torch.stack([loss.weight.detach() for loss in losses]))
        parts = torch.stack([loss.total for loss in losses]) / torch.where(weights > 0, weights, 1)
        shares = (weights > 0) / world_size()
        total = torch.stack(
            [
                self._weighed(name, parts[place], shares[place]) * factor
                for place, (name, (_, factor)) in enumerate(terms.items())
            ]
        ).sum()
        shown = dict(zip(terms, all_sum(parts.detach()).unbind(), strict=True))
        return total, shown

    def terms(self, outputs: DenseOutputs, batch: Batch) -> Terms:
        """Give this rank's losses against its labels, and the weight of each, by name."""
        options = self.options
        pick = self._pixels(batch)
        class_ids = batch.class_ids[pick]
        size = (class_ids.shape[1], class_ids.shape[2])
        terms: Terms = {}
        if outputs.logits is not None and options.classes:
            # In bfloat16, sums of exponentials and interpolated logits would lose too much.
            logits = resize_bilinear(merge_logits(outputs.logits.float(), batch.groups), size)
            log_p = logits.log_softmax(1)
            loss = cross_entropy(log_p, class_ids, self.class_weights)
            terms["classes"] = (loss, options.classes)
            if options.overlap:
                terms["overlap"] = (soft_jaccard(log_p, class_ids), options.overlap)
        if outputs.depth is not None and options.depth:
            known = batch.depth[pick]
            depth = resize_bilinear(outputs.depth.float(), size)[:, 0]
            terms["depth"] = (DEPTH_LOSSES[options.depth_kind](depth, known), options.depth)
            if options.outside_delta1:
                terms["outside"] = (outside_delta1(depth, known), options.outside_delta1)
            if options.sky_depth_m is not None:
                sky = (class_ids == SKY_ID) & (known == 0)
                target = sky * torch.full_like(depth, options.sky_depth_m)
                terms["sky"] = (log_l1(depth, target), options.sky_weight)
        return terms

    def _pixels(self, batch: Batch) -> tuple[slice, slice, slice]:
        """Choose the labelled pixels that are looked at: one of each square of `stride` a side.

        The predictions are resized to the squares' centres; which pixel of the squares it is
        changes from step to step, so that none stands for its square for long.
        """
        stride = self.options.stride
        sides = torch.tensor(batch.class_ids.shape[1:])
        if self.training and stride > 1:
            top, left = torch.randint(stride, (2,)).tolist()
        else:
            top = left = stride // 2
        down, across = (sides // stride * stride).tolist()
        return slice(None), slice(top, down, stride), slice(left, across, stride)

    def _weighed(self, name: str, value: Tensor, share: Tensor) -> Tensor:
        if self.uncertainty is None or name not in self.uncertainty.log_variance:
            return value
        weighed: Tensor = self.uncertainty(name, value, share)
        return weighed


class LossSums:
    """Losses added up over many frames; those of several ranks can be merged."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def update(self, terms: Terms) -> None:
        """Add what `Objective.terms` gave."""
        for name, (loss, factor) in terms.items():
            kept = self._sums.setdefault(name, [0.0, 0.0, factor])
            kept[0] += float(loss.total)
            kept[1] += float(loss.weight)

    def merge(self, other: LossSums) -> None:
        """Add another's sums."""
        for name, (total, weight, factor) in other._sums.items():
            kept = self._sums.setdefault(name, [0.0, 0.0, factor])
            kept[0] += total
            kept[1] += weight

    def to_dict(self) -> dict[str, float]:
        """Give the mean of each loss as `loss_NAME`, and their weighted sum as `loss`."""
        known = {name: sums for name, sums in self._sums.items() if sums[1] > 0}
        means = {f"loss_{name}": total / weight for name, (total, weight, _) in known.items()}
        whole = sum(factor * total / weight for total, weight, factor in known.values())
        return {**means, "loss": whole} if known else {}
