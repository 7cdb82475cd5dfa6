"""Triton kernels of the model's GPU path: depthwise convolution, the heads' last steps, class ids.

Compiled by Triton when first called (seconds), and kept in its cache from then on.

Shapes, also at the end of names: b batch, h and w a grid's sides, c channels, n hidden channels
of all heads together, k classes, o outputs of all heads together, q the finest grid, y and x the
output's sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUTS_PADDED = 32  # a tile of the tensor cores holds at least 16
_LOWS = 3
_PIXELS, _CHANNELS = 32, 64
_TILE, _HIDDEN = 64, 64
_ROW = 256
# With more stages Triton keeps tiles of all maps in shared memory, more than there is from 64
# channels on; four warps would spill registers.
HEADS_LAUNCH = {"num_stages": 1, "num_warps": 8}


@triton.jit
def _depthwise_gelu(
    x_ptr, weight_ptr, bias_ptr, out_ptr, height, width, channels,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = row % height
    xs = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    cs = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    known_c = cs < channels
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for dy in tl.static_range(3):
        is_row = (y + dy - 1 >= 0) & (y + dy - 1 < height)
        line = x_ptr + (row + dy - 1) * width * channels
        for dx in tl.static_range(3):
            at = xs + dx - 1
            is_in = is_row & (at >= 0) & (at < width)
            value = tl.load(
                line + at[:, None] * channels + cs[None, :],
                mask=is_in[:, None] & known_c[None, :],
                other=0.0,
            )
            weight = tl.load(weight_ptr + (dy * 3 + dx) * channels + cs, mask=known_c, other=0.0)
            sums += value.to(tl.float32) * weight[None, :]
    sums += tl.load(bias_ptr + cs, mask=known_c, other=0.0)[None, :]
    active = 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))
    tl.store(
        out_ptr + row * width * channels + xs[:, None] * channels + cs[None, :],
        active.to(out_ptr.dtype.element_ty),
        mask=(xs < width)[:, None] & known_c[None, :],
    )


def depthwise_gelu(x_bhwc: Tensor, weight_9c: Tensor, bias_c: Tensor) -> Tensor:
    """GELU of a depthwise 3x3 convolution with padding 1 and a bias, in one pass.

    Args:
        x_bhwc: (B, H, W, C), contiguous, of any float type.
        weight_9c: float32 (9, C), the taps row by row.
        bias_c: float32 (C,).

    Returns:
        (B, H, W, C) of the type of `x_bhwc`.
    """
    b, h, w, c = x_bhwc.shape
    out_bhwc = torch.empty_like(x_bhwc)
    grid = (b * h, triton.cdiv(w, _PIXELS), triton.cdiv(c, _CHANNELS))
    _depthwise_gelu[grid](
        x_bhwc, weight_9c, bias_c, out_bhwc, h, w, c, PIXELS=_PIXELS, CHANNELS=_CHANNELS
    )
    return out_bhwc


@triton.jit
def _corners(place, size, low_size):
    """The two neighbours of a place on a smaller grid, and the share of the second.

    A side of 1 comes as a constant, which has no type to convert.
    """
    at = (place + 0.5) * (low_size / size) - 0.5
    at = tl.minimum(tl.maximum(at, 0.0), low_size - 1.0)
    first = at.to(tl.int32)
    return first, tl.minimum(first + 1, low_size - 1), at - first.to(tl.float32)


@triton.jit
def _add_resized(sums, low_ptr, b, ys, xs, height, width, low_h, low_w, ns, is_in, hidden):
    top, bottom, down = _corners(ys, height, low_h)
    left, right, along = _corners(xs, width, low_w)
    low_ptr += b * low_h * low_w * hidden + ns[None, :]
    upper_left = tl.load(low_ptr + ((top * low_w + left) * hidden)[:, None], mask=is_in, other=0.0)
    sums += upper_left.to(tl.float32) * ((1 - down) * (1 - along))[:, None]
    upper_right = tl.load(
        low_ptr + ((top * low_w + right) * hidden)[:, None], mask=is_in, other=0.0
    )
    sums += upper_right.to(tl.float32) * ((1 - down) * along)[:, None]
    lower_left = tl.load(
        low_ptr + ((bottom * low_w + left) * hidden)[:, None], mask=is_in, other=0.0
    )
    sums += lower_left.to(tl.float32) * (down * (1 - along))[:, None]
    lower_right = tl.load(
        low_ptr + ((bottom * low_w + right) * hidden)[:, None], mask=is_in, other=0.0
    )
    sums += lower_right.to(tl.float32) * (down * along)[:, None]
    return sums


@triton.jit
def _heads(
    finest_ptr, weight_ptr, low1_ptr, low2_ptr, low3_ptr, predict_ptr, predict_bias_ptr,
    out_ptr, numbers_ptr,
    height, width, h1, w1, h2, w2, h3, w3, channels, hidden, outputs, classes,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    pixels = height * width
    qs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_q = qs < pixels
    ys, xs = qs // width, qs % width
    cs = tl.arange(0, CHANNELS)
    os = tl.arange(0, OUTPUTS)
    x_qc = tl.load(
        finest_ptr + (b * pixels + qs)[:, None] * channels + cs[None, :],
        mask=is_q[:, None] & (cs < channels)[None, :],
        other=0.0,
    )
    outs_qo = tl.zeros((TILE, OUTPUTS), tl.float32)
    for start in range(0, hidden, HIDDEN):
        ns = start + tl.arange(0, HIDDEN)
        is_n = ns < hidden
        is_in = is_q[:, None] & is_n[None, :]
        weight_cn = tl.load(
            weight_ptr + cs[:, None] * hidden + ns[None, :],
            mask=(cs < channels)[:, None] & is_n[None, :],
            other=0.0,
        )
        sums = tl.dot(x_qc, weight_cn)
        sums = _add_resized(sums, low1_ptr, b, ys, xs, height, width, h1, w1, ns, is_in, hidden)
        sums = _add_resized(sums, low2_ptr, b, ys, xs, height, width, h2, w2, ns, is_in, hidden)
        sums = _add_resized(sums, low3_ptr, b, ys, xs, height, width, h3, w3, ns, is_in, hidden)
        # A maximum with NaN may give 0, and what is not finite has to be seen at the end.
        sums = tl.where(sums < 0, 0.0, sums)
        predict_no = tl.load(
            predict_ptr + ns[:, None] * OUTPUTS + os[None, :], mask=is_n[:, None], other=0.0
        )
        # In bfloat16 neighbouring logits would tie.
        outs_qo = tl.dot(sums, predict_no, outs_qo, input_precision="tf32")
    outs_qo += tl.load(predict_bias_ptr + os)[None, :]
    is_out = is_q[:, None] & (os < outputs)[None, :]
    tl.store(out_ptr + (b * outputs + os[None, :]) * pixels + qs[:, None], outs_qo, mask=is_out)

    is_bad = is_out & ~(tl.abs(outs_qo) < float("inf"))
    is_class = (os < classes)[None, :]
    logits = tl.where(is_class, outs_qo, -1e30)
    below = tl.where(is_class, logits - tl.max(logits, 1)[:, None], 0.0)
    powers = tl.where(is_class, tl.exp(below), 0.0)
    total = tl.sum(powers, 1)
    confidence = tl.where(is_q, 1.0 / total, 0.0)
    entropy = tl.where(is_q, tl.log(total) - tl.sum(powers * below, 1) / total, 0.0)
    numbers_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(numbers_ptr, tl.sum(confidence, 0))
    tl.store(numbers_ptr + 1, tl.sum(entropy, 0))
    tl.store(numbers_ptr + 2, tl.sum(tl.sum(is_bad.to(tl.float32), 1), 0))


def fused_heads(
    finest_bhwc: Tensor,
    lows_bhwn: Sequence[Tensor],
    weight_cn: Tensor,
    predict_no: Tensor,
    predict_bias_o: Tensor,
    *,
    outputs: int,
    classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The folded heads from the finest map on: hidden channels never leave the chip.

    Args:
        finest_bhwc: (B, H, W, C), contiguous, bfloat16 or float32.
        lows_bhwn: The three other maps times their matrices, the heads' bias in one of them;
            contiguous, of the type of `finest_bhwc`.
        weight_cn: (C, N), of the same type.
        predict_no: float32 (N, 32): column o is output o's weights, 0 for other heads' channels.
        predict_bias_o: float32 (32,).
        outputs: How many of the 32 there are.
        classes: How many of those, the first, are logits; 0 if there are none.

    Returns:
        float32 (B, outputs, H, W); and float32 (B,) each: of the classes, the mean over the grid
        of the largest probability and of the entropy in nats; how many outputs are not finite.

    Raises:
        ValueError: There are not three smaller maps, or more than 32 outputs.
    """
    if len(lows_bhwn) != _LOWS or not 0 < outputs <= OUTPUTS_PADDED:
        raise ValueError(
            f"{_LOWS} smaller maps and 1 to {OUTPUTS_PADDED} outputs are needed, "
            f"not {len(lows_bhwn)} and {outputs}"
        )
    b, h, w, c = finest_bhwc.shape
    first, second, third = lows_bhwn
    tiles = triton.cdiv(h * w, _TILE)
    outs_boq = finest_bhwc.new_empty((b, outputs, h, w), dtype=torch.float32)
    numbers = finest_bhwc.new_empty((b, tiles, 3), dtype=torch.float32)
    sides = [side for low in lows_bhwn for side in low.shape[1:3]]
    _heads[tiles, b](
        finest_bhwc, weight_cn, first, second, third, predict_no, predict_bias_o,
        outs_boq, numbers,
        h, w, *sides, c, weight_cn.shape[1], outputs, classes,
        CHANNELS=max(16, triton.next_power_of_2(c)), TILE=_TILE, HIDDEN=_HIDDEN,
        OUTPUTS=OUTPUTS_PADDED, **HEADS_LAUNCH,
    )  # fmt: skip
    confidence, entropy, num_bad = numbers.sum(1).unbind(1)
    return outs_boq, confidence / (h * w), entropy / (h * w), num_bad


@triton.jit
def _class_ids(
    logits_ptr, out_ptr, grid_h, grid_w, height, width, classes, stride_b, ROW: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1)
    xs = tl.program_id(2) * ROW + tl.arange(0, ROW)
    is_x = xs < width
    top, bottom, down = _corners(y, height, grid_h)
    left, right, along = _corners(xs, width, grid_w)
    logits_ptr += b * stride_b
    best = tl.full((ROW,), float("-inf"), tl.float32)
    ids = tl.zeros((ROW,), tl.int32)
    for k in range(classes):
        upper = logits_ptr + (k * grid_h + top) * grid_w
        lower = logits_ptr + (k * grid_h + bottom) * grid_w
        start = tl.load(upper + left, mask=is_x, other=0.0) * (1 - down)
        start += tl.load(lower + left, mask=is_x, other=0.0) * down
        end = tl.load(upper + right, mask=is_x, other=0.0) * (1 - down)
        end += tl.load(lower + right, mask=is_x, other=0.0) * down
        value = start * (1 - along) + end * along
        is_more = value > best
        best = tl.where(is_more, value, best)
        ids = tl.where(is_more, k, ids)
    out = out_ptr + (b * height + y) * width + xs
    tl.store(out, ids.to(tl.uint8), mask=is_x)


def resolve_largest(logits_bkq: Tensor, size: tuple[int, int]) -> Tensor:
    """Each pixel's largest class of logits resized bilinearly, which are never written.

    Args:
        logits_bkq: float32 (B, K, h, w); each sample contiguous.
        size: Height and width wanted.

    Returns:
        uint8 (B, height, width).
    """
    b, k, h, w = logits_bkq.shape
    height, width = size
    ids_byx = logits_bkq.new_empty((b, height, width), dtype=torch.uint8)
    grid = (b, height, triton.cdiv(width, _ROW))
    _class_ids[grid](logits_bkq, ids_byx, h, w, height, width, k, logits_bkq.stride(0), ROW=_ROW)
    return ids_byx
