"""Learning from a trained network: its classes, its depth and its features, where it is asked.

Soft classes: Hinton et al. 2015, arXiv 1503.02531. Features ("hints"): Romero et al. 2015, arXiv
1412.6550, here as cosine distance, which does not mind how a teacher's channels are scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from segformer3d.heads import FoldedHeads
from segformer3d.losses import Loss, distillation, log_l1
from segformer3d.model import DenseOutputs, Segformer3D, activate_depth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from segformer3d.recipe import TeacherSection

Terms = dict[str, tuple[Loss, float]]
FIRST_HINT = 1  # the finest map holds edges, which need no teacher


class Teacher(nn.Module):
    """A frozen network whose outputs are learned from."""

    def __init__(self, model: Segformer3D) -> None:
        super().__init__()
        model.eval().requires_grad_(requires_grad=False)
        self.encoder = model.encoder
        heads = (model.segmentation_head, model.depth_head)
        self.heads = FoldedHeads([head for head in heads if head is not None])
        self.config = model.config

    @torch.no_grad()
    def forward(self, x_bchw: Tensor) -> tuple[list[Tensor], DenseOutputs]:
        """Encode and predict as the network does."""
        maps = self.encoder(x_bchw)
        outs = self.heads(maps)
        has_classes, has_depth = self.config.num_classes is not None, self.config.has_depth
        return maps, DenseOutputs(
            logits=outs[0] if has_classes else None,
            depth=activate_depth(outs[-1], self.config) if has_depth else None,
        )


class Lessons(nn.Module):
    """What a student learns from its teacher, with the hints' projections to the teacher's width.

    Args:
        options: What is learned and how much it weighs.
        teacher: The trained network.
        embed_dims: Channels of the student's four maps.
        seed: Seed of the projections.
    """

    def __init__(
        self, options: TeacherSection, teacher: Teacher, embed_dims: Sequence[int], seed: int
    ) -> None:
        super().__init__()
        self.options = options
        self.teacher = teacher
        self.hints = nn.ModuleList()
        if options.features:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                dims = zip(embed_dims, teacher.encoder.embed_dims, strict=True)
                self.hints.extend(
                    nn.Conv2d(own, theirs, 1) for own, theirs in list(dims)[FIRST_HINT:]
                )

    def train(self, mode: bool = True) -> Lessons:
        """Change the mode of all but the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, maps: Sequence[Tensor], outputs: DenseOutputs, asked_b: Tensor, x_bchw: Tensor
    ) -> Terms:
        """Give this rank's losses against the teacher, and the weight of each, by name.

        Args:
            maps: The student's four maps.
            outputs: What the student says.
            asked_b: bool (B,), which samples the teacher's outputs are learned on. Its features
                are learned on all.
            x_bchw: The normalised pictures.
        """
        rows = asked_b.nonzero()[:, 0]
        everything = bool(self.options.features)
        terms: Terms = {}
        lesson: DenseOutputs | None = None
        if everything:
            their_maps, said = self.teacher(x_bchw)
            terms["taught_features"] = (self._hinted(maps, their_maps), self.options.features)
            lesson = _rows(said, rows) if len(rows) else None
        elif len(rows):
            lesson = self.teacher(x_bchw[rows])[1]
        return terms | self._outputs(_rows(outputs, rows), lesson)

    def _outputs(self, said: DenseOutputs, lesson: DenseOutputs | None) -> Terms:
        options = self.options
        terms: Terms = {}
        if said.logits is not None and options.classes:
            loss = _nothing(said.logits)
            if lesson is not None and lesson.logits is not None:
                loss = distillation(said.logits.float(), lesson.logits, options.temperature)
            terms["taught_classes"] = (loss, options.classes)
        if said.depth is not None and options.depth:
            loss = _nothing(said.depth)
            if lesson is not None and lesson.depth is not None:
                loss = log_l1(said.depth.float(), lesson.depth)
            terms["taught_depth"] = (loss, options.depth)
        return terms

    def _hinted(self, maps: Sequence[Tensor], theirs: Sequence[Tensor]) -> Loss:
        """Mean over the hinted maps of each frame's mean cosine distance."""
        distances = [
            1 - functional.cosine_similarity(hint(own.float()), other.float(), dim=1).mean((1, 2))
            for hint, own, other in zip(
                self.hints, maps[FIRST_HINT:], theirs[FIRST_HINT:], strict=True
            )
        ]
        per_frame_b = torch.stack(distances).mean(0)
        return Loss(per_frame_b.sum(), torch.full_like(per_frame_b[0], len(per_frame_b)))


def _rows(outputs: DenseOutputs, rows: Tensor) -> DenseOutputs:
    return DenseOutputs(
        logits=None if outputs.logits is None else outputs.logits[rows],
        depth=None if outputs.depth is None else outputs.depth[rows],
    )


def _nothing(x: Tensor) -> Loss:
    return Loss(x.sum() * 0, torch.zeros((), device=x.device))
