"""From logits on the H / 4 grid to class ids at any size, with two numbers on how sure they are.

Shapes, also at the end of names: b batch, k classes, and q the grid of h / 4 by w / 4.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from segformer3d.layers import resize_bilinear

BAND_FLOATS = 2**28  # logits of full size made at a time: 1 GiB


def resolve_class_ids(logits_bkq: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Resize logits bilinearly and take each pixel's largest class.

    No plane of full size per class is ever made.

    Args:
        logits_bkq: float32 (B, K, h, w), finite, K at most 255.
        size: Height and width wanted.

    Returns:
        uint8 (B, height, width); of the grid, float32 (B,) each: the mean largest class
        probability, and the mean class entropy in nats.
    """
    if logits_bkq.device.type == "cpu":
        return _compiled(logits_bkq, size)
    return (_by_bands(logits_bkq, size), *_confidence_and_entropy(logits_bkq))


def _compiled(logits_bkq: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    # Numba takes half a second to import, and processes that run no model need none.
    from segformer3d.native import resolve

    ids = np.empty((len(logits_bkq), *size), np.uint8)
    numbers = np.empty((2, len(logits_bkq)), np.float32)
    for index, logits in enumerate(logits_bkq.permute(0, 2, 3, 1).contiguous().numpy()):
        numbers[:, index] = resolve(logits, ids[index])
    return torch.from_numpy(ids), *torch.from_numpy(numbers)


def _by_bands(logits_bkq: Tensor, size: tuple[int, int], band_floats: int = BAND_FLOATS) -> Tensor:
    """Resize a band of rows at a time: rows first, at a quarter of the width, then columns."""
    height, width = size
    batch, num_classes, _, source_width = logits_bkq.shape
    # Channels last: both steps are then several times faster on a CPU.
    logits_bkq = logits_bkq.contiguous(memory_format=torch.channels_last)
    columns = resize_bilinear(logits_bkq, (height, source_width))
    rows = max(1, band_floats // (batch * num_classes * width))
    bands = (columns[:, :, top : top + rows] for top in range(0, height, rows))
    ids = [
        resize_bilinear(band, (band.shape[2], width)).argmax(1).to(torch.uint8) for band in bands
    ]
    return torch.cat(ids, dim=1)


def _confidence_and_entropy(logits_bkq: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the grid of the largest class probability and of the entropy in nats: (B,) each."""
    log_p = logits_bkq.log_softmax(1)
    p = log_p.exp()
    return p.amax(1).mean((1, 2)), -(p * log_p).sum(1).mean((1, 2))
