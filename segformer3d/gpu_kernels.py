"""Triton kernels of the heads' GPU path: their last steps, and class ids.

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

from segformer3d.gpu_blocks import padded
from segformer3d.gpu_launch import launch

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUTS_PADDED = 32  # a tile of the tensor cores holds at least 16
# A tile's rows divide the finest map's, which are multiples of 8.
HEADS = {"ROWS": 8, "COLUMNS": 16, "HIDDEN": 64, "num_warps": 8, "num_stages": 2}
IDS = {"CELLS": 128, "num_warps": 4}  # at the usual size, four times that of the grid
_ROW = 256


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
def _shares(
    ys, xs, top, left, low_h, low_w,
    SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AROUND: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """How much of each low pixel around a tile goes to each of the tile's pixels.

    Also where these low pixels are, and which exist. Shares are multiples of 1 / 256 below 1,
    which bfloat16 holds exactly.
    """
    rs = tl.arange(0, AROUND)
    across: tl.constexpr = COLUMNS // SCALE + 2
    low_y, low_x = top // SCALE - 1 + rs // across, left // SCALE - 1 + rs % across
    is_low = (
        (rs < (ROWS // SCALE + 2) * across)
        & (low_y >= 0)
        & (low_y < low_h)
        & (low_x >= 0)
        & (low_x < low_w)
    )
    down = tl.minimum(tl.maximum((ys + 0.5) / SCALE - 0.5, 0.0), low_h - 1.0)
    along = tl.minimum(tl.maximum((xs + 0.5) / SCALE - 0.5, 0.0), low_w - 1.0)
    of_row = tl.maximum(1.0 - tl.abs(down[:, None] - low_y[None, :]), 0.0)
    of_column = tl.maximum(1.0 - tl.abs(along[:, None] - low_x[None, :]), 0.0)
    return (of_row * of_column).to(DTYPE), low_y * low_w + low_x, is_low


@triton.jit
def _low(low_ptr, b, low_pixels, at, is_low, ns, is_n, hidden):
    """Low pixels around a tile, some of their hidden channels."""
    return tl.load(
        low_ptr + (b * low_pixels + at)[:, None] * hidden + ns[None, :],
        mask=is_low[:, None] & is_n[None, :],
        other=0.0,
    )


@triton.jit
def _sum_of_tile(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum what a tile's pixels have; as a plane, or Triton 3.7 cannot compile it for Blackwells."""
    return tl.sum(tl.reshape(values, (ROWS, COLUMNS)))


@triton.jit
def _heads(
    finest_ptr, weight_ptr, low1_ptr, low2_ptr, low3_ptr, predict_ptr, predict_bias_ptr,
    out_ptr, numbers_ptr,
    height, width, channels, hidden, outputs, classes,
    AROUND1: tl.constexpr, AROUND2: tl.constexpr, AROUND3: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    pixels = height * width
    across = tl.cdiv(width, COLUMNS)
    top = tl.program_id(0) // across * ROWS
    left = tl.program_id(0) % across * COLUMNS
    tile = tl.arange(0, ROWS * COLUMNS)
    ys, xs = top + tile // COLUMNS, left + tile % COLUMNS
    qs = ys * width + xs
    is_q = xs < width
    dtype: tl.constexpr = finest_ptr.dtype.element_ty
    h1, w1, h2, w2, h3, w3 = (
        height // 2,
        width // 2,
        height // 4,
        width // 4,
        height // 8,
        width // 8,
    )
    shares1, at1, is1 = _shares(ys, xs, top, left, h1, w1, 2, ROWS, COLUMNS, AROUND1, dtype)
    shares2, at2, is2 = _shares(ys, xs, top, left, h2, w2, 4, ROWS, COLUMNS, AROUND2, dtype)
    shares3, at3, is3 = _shares(ys, xs, top, left, h3, w3, 8, ROWS, COLUMNS, AROUND3, dtype)
    cs = tl.arange(0, CHANNELS)
    os = tl.arange(0, OUTPUTS)
    x_qc = tl.load(
        finest_ptr + (b * pixels + qs)[:, None] * channels + cs[None, :],
        mask=is_q[:, None] & (cs < channels)[None, :],
        other=0.0,
    )
    outs_qo = tl.zeros((ROWS * COLUMNS, OUTPUTS), tl.float32)
    for start in range(0, hidden, HIDDEN):
        ns = start + tl.arange(0, HIDDEN)
        is_n = ns < hidden
        weight_cn = tl.load(
            weight_ptr + cs[:, None] * hidden + ns[None, :],
            mask=(cs < channels)[:, None] & is_n[None, :],
            other=0.0,
        )
        sums = tl.dot(x_qc, weight_cn)
        # Resizing is a product too: of a tile's shares and the low pixels around it.
        sums = tl.dot(shares1, _low(low1_ptr, b, h1 * w1, at1, is1, ns, is_n, hidden), sums)
        sums = tl.dot(shares2, _low(low2_ptr, b, h2 * w2, at2, is2, ns, is_n, hidden), sums)
        sums = tl.dot(shares3, _low(low3_ptr, b, h3 * w3, at3, is3, ns, is_n, hidden), sums)
        # A maximum with NaN may give 0, and what is not finite has to be seen at the end.
        sums = tl.where(sums < 0, 0.0, sums)
        predict_no = tl.load(
            predict_ptr + ns[:, None] + os[None, :] * hidden, mask=is_n[:, None], other=0.0
        )
        outs_qo = tl.dot(sums.to(dtype), predict_no, outs_qo)
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
    tl.store(numbers_ptr, _sum_of_tile(confidence, ROWS, COLUMNS))
    tl.store(numbers_ptr + 1, _sum_of_tile(entropy, ROWS, COLUMNS))
    tl.store(numbers_ptr + 2, _sum_of_tile(tl.sum(is_bad.to(tl.float32), 1), ROWS, COLUMNS))


def _around(scale: int) -> int:
    """Low pixels around a tile, as many as a power of two that the tensor cores take."""
    count = (HEADS["ROWS"] // scale + 2) * (HEADS["COLUMNS"] // scale + 2)
    return padded(count)


def fused_heads(
    finest_bhwc: Tensor,
    lows_bhwn: Sequence[Tensor],
    weight_cn: Tensor,
    predict_on: Tensor,
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
        predict_on: (32, N) of the same type: row o is output o's weights, 0 for the hidden channels
            of other heads.
        predict_bias_o: float32 (32,).
        outputs: How many of the 32 there are.
        classes: How many of those, the first, are logits; 0 if there are none.

    Returns:
        float32 (B, outputs, H, W); and float32 (B,) each: of the classes, the mean over the grid
        of the largest probability and of the entropy in nats; how many outputs are not finite.

    Raises:
        ValueError: The smaller maps are not three of a half, a quarter and an eighth of its sides,
            which have to be multiples of 8; or there are more than 32 outputs.
    """
    b, h, w, c = finest_bhwc.shape
    sizes = [(h // scale, w // scale) for scale in (2, 4, 8)]
    if h % 8 or w % 8 or [tuple(low.shape[1:3]) for low in lows_bhwn] != sizes:
        raise ValueError(f"maps of {sizes} are needed beside one of {(h, w)}, multiples of 8")
    if not 0 < outputs <= OUTPUTS_PADDED:
        raise ValueError(f"1 to {OUTPUTS_PADDED} outputs are needed, not {outputs}")
    first, second, third = lows_bhwn
    tiles = triton.cdiv(h, HEADS["ROWS"]) * triton.cdiv(w, HEADS["COLUMNS"])
    outs_boq = finest_bhwc.new_empty((b, outputs, h, w), dtype=torch.float32)
    numbers = finest_bhwc.new_empty((b, tiles, 3), dtype=torch.float32)
    launch(
        _heads, (tiles, b),
        finest_bhwc, weight_cn, first, second, third, predict_on, predict_bias_o,
        outs_boq, numbers, h, w, c, weight_cn.shape[1], outputs, classes,
        AROUND1=_around(2), AROUND2=_around(4), AROUND3=_around(8),
        CHANNELS=padded(c), OUTPUTS=OUTPUTS_PADDED, **HEADS,
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


@triton.jit
def _class_ids_of_cells(
    logits_ptr, out_ptr, grid_h, grid_w, classes, stride_b, CELLS: tl.constexpr
):
    # A cell lies between four neighbours of the grid, and has 4 x 4 pixels; those of the rims are
    # cut in half.
    b = tl.program_id(0).to(tl.int64)
    cells = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    cells_y, cells_x = cells // (grid_w + 1), cells % (grid_w + 1)
    is_cell = cells_y <= grid_h
    top, bottom = tl.maximum(cells_y - 1, 0), tl.minimum(cells_y, grid_h - 1)
    left, right = tl.maximum(cells_x - 1, 0), tl.minimum(cells_x, grid_w - 1)
    places = tl.arange(0, 16)
    down, along = (places // 4 + 0.5) / 4, (places % 4 + 0.5) / 4
    share00, share01 = ((1 - down) * (1 - along))[None, :], ((1 - down) * along)[None, :]
    share10, share11 = (down * (1 - along))[None, :], (down * along)[None, :]
    logits_ptr += b * stride_b
    best = tl.full((CELLS, 16), float("-inf"), tl.float32)
    ids = tl.zeros((CELLS, 16), tl.int32)
    for k in tl.range(0, classes, loop_unroll_factor=4):
        upper = logits_ptr + (k * grid_h + top) * grid_w
        lower = logits_ptr + (k * grid_h + bottom) * grid_w
        value = tl.load(upper + left, mask=is_cell, other=0.0)[:, None] * share00
        value += tl.load(upper + right, mask=is_cell, other=0.0)[:, None] * share01
        value += tl.load(lower + left, mask=is_cell, other=0.0)[:, None] * share10
        value += tl.load(lower + right, mask=is_cell, other=0.0)[:, None] * share11
        is_more = value > best
        best = tl.where(is_more, value, best)
        ids = tl.where(is_more, k, ids)
    ys = 4 * cells_y[:, None] - 2 + (places // 4)[None, :]
    xs = 4 * cells_x[:, None] - 2 + (places % 4)[None, :]
    is_in = (ys >= 0) & (ys < 4 * grid_h) & (xs >= 0) & (xs < 4 * grid_w)
    tl.store(out_ptr + (b * 4 * grid_h + ys) * (4 * grid_w) + xs, ids.to(tl.uint8), mask=is_in)


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
    if size == (4 * h, 4 * w):
        cells = (b, triton.cdiv((h + 1) * (w + 1), IDS["CELLS"]))
        stride_b = logits_bkq.stride(0)
        launch(_class_ids_of_cells, cells, logits_bkq, ids_byx, h, w, k, stride_b, **IDS)
        return ids_byx
    launch(
        _class_ids, (b, height, triton.cdiv(width, _ROW)),
        logits_bkq, ids_byx, h, w, height, width, k, logits_bkq.stride(0), ROW=_ROW,
    )  # fmt: skip
    return ids_byx
