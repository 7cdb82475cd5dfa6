"""Batches of a training: which sample comes when follows from the seed and the step alone.

So a resumed training, or one spread over more ranks, sees the very same samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from segformer3d.augment import Augmentation, augment
from segformer3d.collective import rank, world_size
from segformer3d.labels import IGNORE_ID
from segformer3d.recipe import RecipeError, expanded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from segformer3d.datasets import Sample, SampleSource
    from segformer3d.recipe import PhaseSection, Recipe


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch.

    Attributes:
        image: uint8 (B, 3, H, W), RGB.
        class_ids: int64 (B, H, W), 255 where unknown.
        depth: float32 (B, H, W), 0 where unknown.
        groups: Per sample, the label that stands for each class.
        distil: bool (B,), whether a teacher speaks about the sample.
    """

    image: Tensor
    class_ids: Tensor
    depth: Tensor
    groups: tuple[tuple[int, ...], ...]
    distil: Tensor

    def to(self, device: torch.device) -> Batch:
        """Move it to a device."""
        return self._with(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Move it to where a GPU fetches faster; the data loader calls this."""
        return self._with(lambda x: x.pin_memory())

    def _with(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            move(self.image),
            move(self.class_ids),
            move(self.depth),
            self.groups,
            move(self.distil),
        )


class Mixture(torch.utils.data.Dataset[Batch]):
    """Several data sets mixed in whole shares; item `step` is this rank's batch of that step."""

    def __init__(self, recipe: Recipe, sources: Sequence[SampleSource]) -> None:
        """Lay the samples of a whole training out.

        Args:
            recipe: Resolved: its phases are told in steps.
            sources: The data sets, in the order of the recipe's `data`.

        Raises:
            RecipeError: A batch cannot be shared out evenly among the ranks.
        """
        # Kept here: the data loader's processes do not know of the other ranks.
        self._rank, self._world = rank(), world_size()
        for number, phase in enumerate(recipe.phases):
            if phase.batch % self._world:
                raise RecipeError(
                    f"phases.{number}.batch: {phase.batch} samples cannot be shared out evenly "
                    f"among {self._world} workers"
                )
        self._recipe = recipe
        self._sources = sources
        shares = [section.share for section in recipe.data]
        self._pattern = _interleaved(shares)
        self._starts = np.cumsum([0, *(phase.num_steps for phase in recipe.phases)])
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Number of steps."""
        return int(self._starts[-1])

    def __getitem__(self, step: int) -> Batch:
        """Make this rank's share of the batch of a step."""
        phase, first = self._place(step)
        own = range(self._rank, phase.batch, self._world)
        picks = [self.pick(first + position) for position in own]
        samples = [
            self._sample(source, index, phase, [self._recipe.seed, step, position])
            for (source, index), position in zip(picks, own, strict=True)
        ]
        return batch_of(
            samples,
            [self._sources[source].groups for source, _ in picks],
            [self._recipe.data[source].distil for source, _ in picks],
        )

    def _place(self, step: int) -> tuple[PhaseSection, int]:
        """Give a step's phase and the number of samples before it."""
        index = int(np.searchsorted(self._starts, step, side="right")) - 1
        phases = self._recipe.phases
        before = sum(phase.num_steps * phase.batch for phase in phases[:index])
        return phases[index], before + (step - int(self._starts[index])) * phases[index].batch

    def pick(self, number: int) -> tuple[int, int]:
        """Give the data set and the index of the n-th sample of the whole training, from 0."""
        cycle, place = divmod(number, len(self._pattern))
        source = self._pattern[place]
        shares = self._pattern.count(source)
        draw = cycle * shares + self._pattern[:place].count(source)
        epoch, index = divmod(draw, len(self._sources[source]))
        return source, int(self._order(source, epoch)[index])

    def _order(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Shuffle a data set for one of its epochs."""
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            rng = np.random.default_rng([self._recipe.seed, source, epoch])
            kept = (epoch, rng.permutation(len(self._sources[source])))
            self._orders[source] = kept
        return kept[1]

    def _sample(self, source: int, index: int, phase: PhaseSection, seed: list[int]) -> Sample:
        section = self._recipe.data[source]
        options: Augmentation = section.augmentation or self._recipe.augmentation
        return augment(
            self._sources[source][index],
            np.random.default_rng(seed),
            options,
            short_side_px=self._recipe.short_side_px,
            crop_px=phase.crop_px,
        )


def _interleaved(shares: Sequence[int]) -> list[int]:
    """Spread the data sets evenly over one cycle: shares (2, 1) give 0, 1, 0."""
    places = [
        ((number + 0.5) / share, index)
        for index, share in enumerate(shares)
        for number in range(share)
    ]
    return [index for _, index in sorted(places)]


def open_sources(recipe: Recipe, open_source: Callable[[str], SampleSource]) -> list[SampleSource]:
    """Open a recipe's data sets.

    Args:
        recipe: Its addresses may name environment variables and `~`.
        open_source: Opens one.

    Raises:
        RecipeError: A variable is not set, a data set is empty, or its depth is of another kind
            than the recipe's.
        DatasetError: A data set cannot be opened.
    """
    sources = []
    needed = "metric" if recipe.depth_codec == "metric" else "relative"
    for place, section in enumerate(recipe.data):
        where = f"data.{place}.dataset"
        source = open_source(expanded(section.dataset, where))
        if len(source) == 0:
            raise RecipeError(f"{where}: {section.dataset} is empty")
        learned = recipe.model.has_depth and recipe.loss.depth > 0
        if learned and source.depth_kind not in ("none", needed):
            raise RecipeError(
                f"{where}: its depth is {source.depth_kind}, but depth_codec is "
                f"{recipe.depth_codec}"
            )
        sources.append(source)
    return sources


def batch_of(
    samples: Sequence[Sample],
    groups: Sequence[Sequence[int]],
    distil: Sequence[bool] | None = None,
) -> Batch:
    """Stack samples of one size.

    Args:
        samples: What they lack becomes unknown, depth that is not finite too.
        groups: Per sample, the label that stands for each class.
        distil: Per sample, whether a teacher speaks about it; by default about none.
    """
    return Batch(
        image=torch.from_numpy(np.stack([s.image.transpose(2, 0, 1) for s in samples])),
        class_ids=torch.from_numpy(np.stack([_class_ids(s) for s in samples])).long(),
        depth=torch.from_numpy(np.stack([_depth(s) for s in samples])),
        groups=tuple(tuple(group) for group in groups),
        distil=torch.tensor(list(distil) if distil is not None else [False] * len(samples)),
    )


def _class_ids(sample: Sample) -> NDArray[np.uint8]:
    if sample.class_ids is None:
        return np.full(sample.image.shape[:2], IGNORE_ID, np.uint8)
    return sample.class_ids


def _depth(sample: Sample) -> NDArray[np.float32]:
    if sample.depth is None:
        return np.zeros(sample.image.shape[:2], np.float32)
    depth = np.nan_to_num(sample.depth, nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(depth, np.float32)
