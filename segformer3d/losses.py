"""Losses that mask what is unknown. Each gives its weighted sum and its weight per batch.

Sums and weights are kept apart so that several ranks, or samples with and without labels, add up
to the loss of one large batch. Shapes: b batch, k classes, h and w the labels' sides.

Sources: inverse Huber ("berHu"): Laina et al. 2016, arXiv 1606.00373, eq. 2; scale-invariant
logarithmic error: Eigen et al. 2014, arXiv 1406.2283, eq. 4; distillation: Hinton et al. 2015,
arXiv 1503.02531; learned weights: Kendall et al. 2018, arXiv 1705.07115; soft Jaccard index:
Rahman and Wang 2016, "Optimizing intersection-over-union in deep neural networks for image
segmentation"; Welsch loss: Barron 2019, arXiv 1701.03077, its alpha at minus infinity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from segformer3d.collective import all_max, all_sum, world_size
from segformer3d.labels import IGNORE_ID

if TYPE_CHECKING:
    from collections.abc import Sequence

LOG_DEPTH_FLOOR = 1e-3  # metres; keeps logarithms of an untrained depth head finite
BERHU_SHARE = 0.2
BEND_MIN = 1e-6
ABSENT_LOGIT = -1e4


class Loss(NamedTuple):
    """A weighted sum over pixels or frames, and the sum of the weights."""

    total: Tensor
    weight: Tensor


def cross_entropy(log_p_bkhw: Tensor, target_bhw: Tensor, class_weights: Tensor | None) -> Loss:
    """Cross entropy over the pixels whose class is known.

    Args:
        log_p_bkhw: float (B, K, H, W), log probabilities.
        target_bhw: int64 (B, H, W), 255 where unknown.
        class_weights: float (K,), or None for equal ones.
    """
    total = functional.nll_loss(
        log_p_bkhw, target_bhw, class_weights, ignore_index=IGNORE_ID, reduction="sum"
    )
    known = target_bhw != IGNORE_ID
    if class_weights is None:
        return Loss(total, known.sum().to(total))
    return Loss(total, class_weights[target_bhw[known]].sum())


def soft_jaccard(log_p_bkhw: Tensor, target_bhw: Tensor) -> Loss:
    """One less the mean soft intersection over union of the classes in the batch of all ranks.

    Every class that is there counts the same, however few pixels it has.

    Args:
        log_p_bkhw: float (B, K, H, W), log probabilities.
        target_bhw: int64 (B, H, W), 255 where unknown.
    """
    known_bhw = target_bhw != IGNORE_ID
    # Masked by a product: picking pixels out of planes costs ten times as much on its way back.
    p_bkhw = log_p_bkhw.exp() * known_bhw[:, None]
    hits_bhw = p_bkhw.gather(1, (target_bhw * known_bhw)[:, None])[:, 0]
    target_n = target_bhw[known_bhw]
    count = target_n.bincount(minlength=p_bkhw.shape[1]).to(p_bkhw)
    inside = torch.zeros_like(count).index_add(0, target_n, hits_bhw[known_bhw])
    inside, count, claimed = all_sum(torch.stack([inside, count, p_bkhw.sum((0, 2, 3))])).unbind()
    there = count > 0
    index = inside[there] / (count + claimed - inside)[there]
    share = there.any().to(p_bkhw) / world_size()
    return Loss((1 - index).sum() / there.sum().clamp_min(1) / world_size(), share)


def merge_logits(logits_bkhw: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Add up the probabilities of classes that one label stands for, per sample.

    Args:
        logits_bkhw: float (B, K, h, w).
        groups: Per sample, the label that stands for each class.

    Returns:
        Logits (B, K, h, w) whose softmax holds each label's probability; classes that stand for
        nothing have about none.
    """
    num_classes = logits_bkhw.shape[1]
    identity = tuple(range(num_classes))
    merged = logits_bkhw
    for group in {tuple(group) for group in groups} - {identity}:
        rows = [row for row, other in enumerate(groups) if tuple(other) == group]
        index = torch.tensor(rows, device=logits_bkhw.device)
        merged = merged.index_copy(0, index, _merged(logits_bkhw[index], group))
    return merged


def _merged(logits: Tensor, group: Sequence[int]) -> Tensor:
    planes = []
    for label in range(len(group)):
        members = [index for index, other in enumerate(group) if other == label]
        if not members:
            planes.append(torch.full_like(logits[:, 0], ABSENT_LOGIT))
        elif len(members) == 1:
            planes.append(logits[:, members[0]])
        else:
            planes.append(logits[:, members].logsumexp(1))
    return torch.stack(planes, dim=1)


def mse(depth: Tensor, target: Tensor) -> Loss:
    """Square the error of known pixels; both (B, H, W), `target` 0 where unknown."""
    known = target > 0
    return Loss((depth - target)[known].square().sum(), known.sum().to(depth))


def inverse_huber(depth: Tensor, target: Tensor) -> Loss:
    """Absolute error where small, squared where large; the bend is at 0.2 of the largest error.

    The largest error is that of the whole batch, of all ranks; the bend has no gradient. Both
    (B, H, W), `target` 0 where unknown.
    """
    known = target > 0
    error = (depth - target)[known].abs()
    largest = error.detach().max() if error.numel() else error.new_zeros(())
    bend = (BERHU_SHARE * all_max(largest)).clamp_min(BEND_MIN)
    loss = torch.where(error <= bend, error, (error.square() + bend * bend) / (2 * bend))
    return Loss(loss.sum(), known.sum().to(depth))


def scale_invariant_log(depth: Tensor, target: Tensor, focus: float = 0.5) -> Loss:
    """Mean squared log error less `focus` times the squared mean, per frame with any depth.

    Every such frame weighs the same, however many of its pixels are known.

    Args:
        depth: float (B, H, W), positive; smaller than a millimetre counts as that.
        target: float (B, H, W), 0 where unknown.
        focus: 0 is plain squared log error, 1 ignores a frame's overall scale.
    """
    known = target > 0
    difference = _log_difference(depth, target) * known
    count = known.sum((1, 2)).clamp_min(1)
    mean = difference.sum((1, 2)) / count
    per_frame = difference.square().sum((1, 2)) / count - focus * mean.square()
    return Loss(per_frame.sum(), known.any(2).any(1).sum().to(depth))


def log_l1(depth: Tensor, target: Tensor) -> Loss:
    """Absolute difference of logarithms over known pixels: about the relative error.

    Args:
        depth: float (B, H, W), positive; smaller than a millimetre counts as that.
        target: float (B, H, W), 0 where unknown.
    """
    known = target > 0
    return Loss((_log_difference(depth, target) * known).abs().sum(), known.sum().to(depth))


def relative(depth: Tensor, target: Tensor) -> Loss:
    """Absolute error over true depth, known pixels only: AbsRel of Eigen et al. 2014, section 4.2.

    Unlike `log_l1` it forgives no far guess at something near, as at the rims of poles.

    Args:
        depth: float (B, H, W).
        target: float (B, H, W), 0 where unknown.
    """
    known = target > 0
    error = (depth.float() - target).abs() / torch.where(known, target, 1)
    return Loss((error * known).sum(), known.sum().to(error))


def outside_delta1(depth: Tensor, target: Tensor) -> Loss:
    """How much of the known pixels is out by more than a factor of about 1.25, softly.

    The Welsch loss 1 - exp(-(e / c)^2 / 2) of the logarithms' difference e, with c = ln 1.25. It
    pulls most at the edge of delta < 1.25, and hardly at what is right already or cannot be right,
    as the rims that a resized map blurs. So it needs another loss beside it, one that pulls from
    afar.

    Args:
        depth: float (B, H, W), positive; smaller than a millimetre counts as that.
        target: float (B, H, W), 0 where unknown.
    """
    known = target > 0
    bends = (_log_difference(depth, target) / math.log(1.25)).square() / 2
    return Loss((-torch.expm1(-bends) * known).sum(), known.sum().to(bends))


def distillation(student_bkhw: Tensor, teacher_bkhw: Tensor, temperature: float) -> Loss:
    """Kullback-Leibler divergence of the student from its teacher, times temperature squared.

    Args:
        student_bkhw: Logits (B, K, h, w).
        teacher_bkhw: Logits of the same shape.
        temperature: Softens both; the square keeps the gradients' size.
    """
    log_p = (student_bkhw.float() / temperature).log_softmax(1)
    teacher_log_p = (teacher_bkhw.float() / temperature).log_softmax(1)
    total = functional.kl_div(log_p, teacher_log_p, reduction="sum", log_target=True)
    pixels = student_bkhw.shape[0] * student_bkhw.shape[2] * student_bkhw.shape[3]
    return Loss(total * temperature**2, total.new_tensor(float(pixels)))


DEPTH_LOSSES = {
    "mse": mse,
    "inverse_huber": inverse_huber,
    "scale_invariant_log": scale_invariant_log,
    "log_l1": log_l1,
    "relative": relative,
}


class UncertaintyWeights(nn.Module):
    """A learned weight per task: sum of exp(-s) L + s / 2, s the task's log variance.

    A batch that says nothing about a task leaves its s alone.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.log_variance = nn.ParameterDict(
            {task: nn.Parameter(torch.zeros(())) for task in tasks}
        )

    def forward(self, task: str, loss: Tensor, share: Tensor) -> Tensor:
        """Weigh one task's loss.

        Args:
            task: Its name.
            loss: This rank's part of it.
            share: Of the term s / 2: 1 over the number of ranks, or 0 where nothing is known.
        """
        s = self.log_variance[task]
        weighed: Tensor = torch.exp(-s) * loss + s / 2 * share
        return weighed


def _log_difference(depth: Tensor, target: Tensor) -> Tensor:
    log_target = torch.where(target > 0, target, 1).log()
    return depth.float().clamp_min(LOG_DEPTH_FLOOR).log() - log_target
