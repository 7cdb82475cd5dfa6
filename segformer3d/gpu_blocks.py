"""Triton kernels of the encoder's GPU path: what torch would write to memory and read again.

The residual stream lacks the biases that were never added to it; every norm takes them as `shift`.
Compiled by Triton when first called (seconds), and kept in its cache from then on.

Shapes, also at the end of names: b batch, h and w a grid's sides, n = b * h * w tokens, c channels,
f features of a product, v values of a patch, m reduced tokens, s shares of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.knobs
import triton.language as tl
from torch import Tensor

from segformer3d.gpu_launch import launch

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TILE_MIN = 16  # what a side of a tile of the tensor cores holds at least
TAPS = 7  # of the stem's convolution, per side
TAP_BYTES = 32  # a row of taps, three channels each, and zeros up to a power of two
STEM_STRIDE = 4
# Tokens or pixels, channels or features, rows or keys of one program; measured on a Hopper
# (benchmarks/RESULTS.md).
STEM = {"PIXELS": 128, "num_warps": 4}
NORM_FLOATS = 4096
PRODUCT = {"ROWS": 64, "FEATURES": 64, "num_warps": 4}
CONVOLUTION = {"PAIRS": 8, "CHANNELS": 64, "STRIP": 8, "num_warps": 4}
REDUCTION = {"ROWS": 64, "FEATURES": 64, "VALUES": 64, "num_warps": 4, "num_stages": 4}
ATTENTION = {"ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
THIN_ATTENTION = ATTENTION | {"ROWS": 64, "num_warps": 4}  # of heads of less than 64 channels


@dataclass(frozen=True)
class Norm:
    """A layer norm, and what its input lacks; all float32 (C,).

    Attributes:
        shift: Added to the input first.
        scale: Multiplies what is normed.
        bias: Added to that.
        eps: Added to the variance.
    """

    shift: Tensor
    scale: Tensor
    bias: Tensor
    eps: float


def padded(count: int) -> int:
    """Give the side of a tile that holds so many."""
    return max(TILE_MIN, 1 << (count - 1).bit_length())


@triton.jit
def _tanh(x):
    if INTERPRETED:
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    # One instruction, to within 5e-4 of the value; bfloat16 keeps 4e-3.
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _gelu(x):
    """GELU by its tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    The form is off by 5e-4 at most, the instruction for `tanh` by 2.5e-4 |x|.
    """
    half = 0.5 * x
    return half * _tanh(x * (0.035677408136300125 * x * x + 0.7978845608028654)) + half


@triton.jit
def _normed(x, cs, is_c, channels, shift_ptr, scale_ptr, bias_ptr, eps):
    """Norm float32 rows whose columns beyond the channels are 0."""
    x += tl.load(shift_ptr + cs, mask=is_c, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cs, mask=is_c, other=0.0)
    bias = tl.load(bias_ptr + cs, mask=is_c, other=0.0)
    mean = tl.sum(x, 1) / channels
    centred = tl.where(is_c[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / channels
    return centred * tl.rsqrt(variance + eps)[:, None] * scale[None, :] + bias[None, :]


@triton.jit
def _normed_rows(
    x_ptr, rows, is_row, cs, channels, shift_ptr, scale_ptr, bias_ptr, eps, DTYPE: tl.constexpr
):
    """Load tokens of a stream, and norm them."""
    is_c = cs < channels
    x = tl.load(
        x_ptr + rows[:, None] * channels + cs[None, :],
        mask=is_row[:, None] & is_c[None, :],
        other=0.0,
    ).to(tl.float32)
    return _normed(x, cs, is_c, channels, shift_ptr, scale_ptr, bias_ptr, eps).to(DTYPE)


@triton.jit
def _stem(
    pixels_ptr, offset_ptr, rim_ptr, weight_ptr, shift_ptr, scale_ptr, bias_ptr, out_ptr,
    height, width, out_h, out_w, channels, eps,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    NUM_TAPS: tl.constexpr, BYTES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, oy = row // out_h, row % out_h
    xs = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    cs = tl.arange(0, CHANNELS)
    js = tl.arange(0, BYTES)
    is_c = cs < channels
    is_x = xs < out_w
    columns = xs[:, None] * STRIDE - NUM_TAPS // 2 + (js // 3)[None, :]
    is_in = (columns >= 0) & (columns < width) & (js < 3 * NUM_TAPS)[None, :] & is_x[:, None]
    offset, rim = tl.load(offset_ptr + js % 3), tl.load(rim_ptr + js % 3)
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for ky in range(NUM_TAPS):
        y = oy * STRIDE - NUM_TAPS // 2 + ky
        is_there = is_in & (y >= 0) & (y < height)
        at = (b * height + y) * width * 3 + columns * 3 + (js % 3)[None, :]
        value = tl.load(pixels_ptr + at, mask=is_there, other=0).to(tl.float32) - offset[None, :]
        value = tl.where(is_there, value, rim[None, :]).to(weight_ptr.dtype.element_ty)
        weight = tl.load(
            weight_ptr + (ky * BYTES + js)[:, None] * channels + cs[None, :],
            mask=is_c[None, :],
            other=0.0,
        )
        sums = tl.dot(value, weight, sums)
    out = _normed(sums, cs, is_c, channels, shift_ptr, scale_ptr, bias_ptr, eps)
    tl.store(
        out_ptr + (row * out_w + xs)[:, None] * channels + cs[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=is_x[:, None] & is_c[None, :],
    )


def embed_pixels(
    pixels_bhwc: Tensor, offset_3: Tensor, rim_3: Tensor, weight_tjc: Tensor, norm: Norm
) -> Tensor:
    """The first patch embedding, from bytes: normalising, a 7x7 convolution, a norm.

    Args:
        pixels_bhwc: uint8 (B, H, W, 3), contiguous; both sides multiples of 4.
        offset_3: float32 (3,), subtracted from the pixels; where whole, they stay exact.
        rim_3: float32 (3,), what lies beyond the frame after that.
        weight_tjc: (7, 32, C): row of taps, tap within it times channel of the pixel, and zeros.
        norm: The convolution's bias is its shift.

    Returns:
        (B, H / 4, W / 4, C) of the type of the weights.
    """
    b, height, width, _ = pixels_bhwc.shape
    channels = weight_tjc.shape[2]
    out_h, out_w = height // STEM_STRIDE, width // STEM_STRIDE
    out_bhwc = weight_tjc.new_empty((b, out_h, out_w, channels))
    grid = (b * out_h, triton.cdiv(out_w, STEM["PIXELS"]))
    launch(
        _stem, grid,
        pixels_bhwc, offset_3, rim_3, weight_tjc, norm.shift, norm.scale, norm.bias, out_bhwc,
        height, width, out_h, out_w, channels, norm.eps,
        CHANNELS=padded(channels), NUM_TAPS=TAPS, BYTES=TAP_BYTES, STRIDE=STEM_STRIDE, **STEM,
    )  # fmt: skip
    return out_bhwc


@triton.jit
def _norm(
    x_ptr, shift_ptr, scale_ptr, bias_ptr, out_ptr, count, channels, eps,
    SHARES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cs = tl.arange(0, CHANNELS)
    is_row, is_c = rows < count, cs < channels
    mask = is_row[:, None] & is_c[None, :]
    x = tl.zeros((ROWS, CHANNELS), tl.float32)
    for share in tl.static_range(SHARES):
        x += tl.load(
            x_ptr + (share * count + rows)[:, None] * channels + cs[None, :], mask=mask, other=0.0
        )
    out = _normed(x, cs, is_c, channels, shift_ptr, scale_ptr, bias_ptr, eps)
    tl.store(
        out_ptr + rows[:, None] * channels + cs[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """Norm the last axis of a contiguous (..., C); of the same type and shape."""
    out = torch.empty_like(x)
    _launch_norm(x, norm, out, shares=1)
    return out


def _launch_norm(x: Tensor, norm: Norm, out: Tensor, *, shares: int) -> None:
    channels = out.shape[-1]
    count = out.numel() // channels
    side = triton.next_power_of_2(channels)
    rows = max(1, NORM_FLOATS // side)
    launch(
        _norm, (triton.cdiv(count, rows),),
        x, norm.shift, norm.scale, norm.bias, out, count, channels, norm.eps,
        SHARES=shares, ROWS=rows, CHANNELS=side,
    )  # fmt: skip


@triton.jit
def _norm_linear(
    x_ptr, shift_ptr, scale_ptr, bias_ptr, weight_ptr, weight_bias_ptr, out_ptr,
    count, channels, features, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cs = tl.arange(0, CHANNELS)
    is_row, is_c = rows < count, cs < channels
    x = _normed_rows(
        x_ptr, rows, is_row, cs, channels, shift_ptr, scale_ptr, bias_ptr, eps,
        weight_ptr.dtype.element_ty,
    )  # fmt: skip
    for start in range(0, features, FEATURES):
        fs = start + tl.arange(0, FEATURES)
        is_f = fs < features
        weight = tl.load(
            weight_ptr + cs[:, None] * features + fs[None, :],
            mask=is_c[:, None] & is_f[None, :],
            other=0.0,
        )
        out = tl.dot(x, weight) + tl.load(weight_bias_ptr + fs, mask=is_f, other=0.0)[None, :]
        tl.store(
            out_ptr + rows[:, None] * features + fs[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=is_row[:, None] & is_f[None, :],
        )


def norm_linear(x: Tensor, norm: Norm, weight_cf: Tensor, bias_f: Tensor) -> Tensor:
    """A norm, a product and a bias, in one pass.

    Args:
        x: (..., C), contiguous; C at most 128.
        norm: Of its channels.
        weight_cf: (C, F), of the type of `x`.
        bias_f: float32 (F,).

    Returns:
        (..., F) of the type of `x`.
    """
    channels, features = weight_cf.shape
    count = x.numel() // channels
    out = x.new_empty((*x.shape[:-1], features))
    launch(
        _norm_linear, (triton.cdiv(count, PRODUCT["ROWS"]),),
        x, norm.shift, norm.scale, norm.bias, weight_cf, bias_f, out,
        count, channels, features, norm.eps, CHANNELS=padded(channels), **PRODUCT,
    )  # fmt: skip
    return out


@triton.jit
def _add_taps(total, left, middle, right, w0, w1, w2):
    """Product by product, each of which is added in the same instruction."""
    total = total + left * w0
    total = total + middle * w1
    return total + right * w2


@triton.jit
def _depthwise_gelu(
    x_ptr, weight_ptr, bias_ptr, out_ptr, height, width, channels,
    PAIRS: tl.constexpr, CHANNELS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    # Blocks that run at the same time are neighbours, whose rims the cache still has.
    strips = tl.cdiv(height, STRIP)
    b = (tl.program_id(1) // strips).to(tl.int64)
    top = (tl.program_id(1) % strips) * STRIP
    tiles = tl.cdiv(width, 2 * PAIRS)
    # Two neighbours need four columns, so that each is loaded twice rather than three times.
    xs = (tl.program_id(0) % tiles) * 2 * PAIRS + 2 * tl.arange(0, PAIRS)
    # A thread with more channels would need more registers for their taps than there are.
    cs = (tl.program_id(0) // tiles) * CHANNELS + tl.max_contiguous(tl.arange(0, CHANNELS), 4)
    is_c = cs < channels
    place = xs[:, None] * channels + cs[None, :]
    is_0 = ((xs > 0) & (xs <= width))[:, None] & is_c[None, :]
    is_1 = (xs < width)[:, None] & is_c[None, :]
    is_2 = (xs + 1 < width)[:, None] & is_c[None, :]
    is_3 = (xs + 2 < width)[:, None] & is_c[None, :]
    w00 = tl.load(weight_ptr + cs, mask=is_c, other=0.0)[None, :]
    w01 = tl.load(weight_ptr + channels + cs, mask=is_c, other=0.0)[None, :]
    w02 = tl.load(weight_ptr + 2 * channels + cs, mask=is_c, other=0.0)[None, :]
    w10 = tl.load(weight_ptr + 3 * channels + cs, mask=is_c, other=0.0)[None, :]
    w11 = tl.load(weight_ptr + 4 * channels + cs, mask=is_c, other=0.0)[None, :]
    w12 = tl.load(weight_ptr + 5 * channels + cs, mask=is_c, other=0.0)[None, :]
    w20 = tl.load(weight_ptr + 6 * channels + cs, mask=is_c, other=0.0)[None, :]
    w21 = tl.load(weight_ptr + 7 * channels + cs, mask=is_c, other=0.0)[None, :]
    w22 = tl.load(weight_ptr + 8 * channels + cs, mask=is_c, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cs, mask=is_c, other=0.0)[None, :]
    # Each row goes to the sums of three: its own, that above, which it ends, and that below.
    above_1 = tl.zeros((PAIRS, CHANNELS), tl.float32) + bias
    above_2, own_1, own_2 = above_1, above_1, above_1
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for step in tl.static_range(STRIP + 2):
        y = top + step - 1
        is_there = (y >= 0) & (y < height)
        line = x_ptr + ((b * height + y) * width) * channels + place
        x0 = tl.load(line - channels, mask=is_0 & is_there, other=0.0).to(tl.float32)
        x1 = tl.load(line, mask=is_1 & is_there, other=0.0).to(tl.float32)
        x2 = tl.load(line + channels, mask=is_2 & is_there, other=0.0).to(tl.float32)
        x3 = tl.load(line + 2 * channels, mask=is_3 & is_there, other=0.0).to(tl.float32)
        if step >= 2:
            out = out_ptr + ((b * height + y - 1) * width) * channels + place
            done_1 = _gelu(_add_taps(above_1, x0, x1, x2, w20, w21, w22)).to(dtype)
            tl.store(out, done_1, mask=is_1 & (y <= height))
            done_2 = _gelu(_add_taps(above_2, x1, x2, x3, w20, w21, w22)).to(dtype)
            tl.store(out + channels, done_2, mask=is_2 & (y <= height))
        above_1 = _add_taps(own_1, x0, x1, x2, w10, w11, w12)
        above_2 = _add_taps(own_2, x1, x2, x3, w10, w11, w12)
        own_1 = _add_taps(bias, x0, x1, x2, w00, w01, w02)
        own_2 = _add_taps(bias, x1, x2, x3, w00, w01, w02)


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
    tiles = triton.cdiv(w, 2 * CONVOLUTION["PAIRS"]) * triton.cdiv(c, CONVOLUTION["CHANNELS"])
    grid = (tiles, b * triton.cdiv(h, CONVOLUTION["STRIP"]))
    launch(_depthwise_gelu, grid, x_bhwc, weight_9c, bias_c, out_bhwc, h, w, c, **CONVOLUTION)
    return out_bhwc


@triton.jit
def _reduce(
    x_ptr, weight_ptr, out_ptr, count, grid_h, grid_w, channels,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    fs = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    py = tl.program_id(2)
    is_row, is_f = rows < count, fs < channels
    b, y, x = rows // (grid_h * grid_w), rows // grid_w % grid_h, rows % grid_w
    tokens = ((b * grid_h + y) * STRIDE + py) * (grid_w * STRIDE) + x * STRIDE
    # The tokens of a row of a patch are neighbours, and so are their channels.
    run = STRIDE * channels
    sums = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(0, run, VALUES):
        vs = start + tl.arange(0, VALUES)
        is_v = vs < run
        value = tl.load(
            x_ptr + tokens[:, None] * channels + vs[None, :],
            mask=is_row[:, None] & is_v[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + (py * run + vs)[:, None] * channels + fs[None, :],
            mask=is_v[:, None] & is_f[None, :],
            other=0.0,
        )
        sums = tl.dot(value, weight, sums)
    tl.store(
        out_ptr + (py * count + rows)[:, None] * channels + fs[None, :],
        sums,
        mask=is_row[:, None] & is_f[None, :],
    )


def reduce_patches(x_bhwc: Tensor, weight_vc: Tensor, stride: int, norm: Norm) -> Tensor:
    """A convolution over patches that do not overlap, and a norm.

    Args:
        x_bhwc: (B, H, W, C), contiguous; sides multiples of the stride.
        weight_vc: (stride * stride * C, C): row and column of a patch, channel; of the same type.
        stride: Of the patches.
        norm: The convolution's bias is its shift.

    Returns:
        (B, H / stride, W / stride, C) of the same type.
    """
    b, h, w, c = x_bhwc.shape
    out_bhwc = x_bhwc.new_empty((b, h // stride, w // stride, c))
    count = out_bhwc.numel() // c
    # The rows of a patch in programs of their own: there are few patches, and they are long.
    sums_smc = x_bhwc.new_empty((stride, count, c), dtype=torch.float32)
    grid = (triton.cdiv(count, REDUCTION["ROWS"]), triton.cdiv(c, REDUCTION["FEATURES"]), stride)
    launch(
        _reduce, grid,
        x_bhwc, weight_vc, sums_smc, count, h // stride, w // stride, c,
        STRIDE=stride, **REDUCTION,
    )  # fmt: skip
    _launch_norm(sums_smc, norm, out_bhwc, shares=stride)
    return out_bhwc


@triton.jit
def _attend(
    x_ptr, shift_ptr, scale_ptr, bias_ptr, query_ptr, query_bias_ptr, kv_ptr, out_weight_ptr,
    out_ptr, tokens, keys, channels, eps,
    IS_ONLY: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = own < tokens
    rows = b * tokens + own
    cs = tl.arange(0, CHANNELS)
    ds = tl.arange(0, WIDTH)
    is_c, is_d = cs < channels, ds < OWN
    fs = tl.program_id(2) * OWN + ds
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    normed = _normed_rows(
        x_ptr, rows, is_row, cs, channels, shift_ptr, scale_ptr, bias_ptr, eps, dtype
    )
    query = tl.load(
        query_ptr + cs[:, None] + fs[None, :] * channels,
        mask=is_c[:, None] & is_d[None, :],
        other=0.0,
    )
    q = tl.dot(normed, query) + tl.load(query_bias_ptr + fs, mask=is_d, other=0.0)[None, :]
    q = q.to(dtype)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    powers_sum = tl.zeros((ROWS,), tl.float32)
    gathered = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, keys, KEYS):
        ms = start + tl.arange(0, KEYS)
        is_m = ms < keys
        line = (b * keys + ms) * (2 * channels)
        k = tl.load(
            kv_ptr + line[None, :] + fs[:, None], mask=is_d[:, None] & is_m[None, :], other=0.0
        )
        scores = tl.dot(q, k)
        if not IS_EVEN:
            scores = tl.where(is_m[None, :], scores, float("-inf"))
        now_most = tl.maximum(most, tl.max(scores, 1))
        powers = tl.exp2(scores - now_most[:, None])
        fade = tl.exp2(most - now_most)
        powers_sum = powers_sum * fade + tl.sum(powers, 1)
        v = tl.load(
            kv_ptr + line[:, None] + (channels + fs)[None, :],
            mask=is_m[:, None] & is_d[None, :],
            other=0.0,
        )
        gathered = tl.dot(powers.to(dtype), v, gathered * fade[:, None])
        most = now_most
    attended = (gathered / powers_sum[:, None]).to(dtype)
    if IS_ONLY:
        out_weight = tl.load(
            out_weight_ptr + fs[:, None] + cs[None, :] * channels,
            mask=is_d[:, None] & is_c[None, :],
            other=0.0,
        )
        at = rows[:, None] * channels + cs[None, :]
        mask = is_row[:, None] & is_c[None, :]
        total = tl.dot(attended, out_weight)
        total += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, total.to(dtype), mask=mask)
    else:
        tl.store(
            out_ptr + rows[:, None] * channels + fs[None, :],
            attended,
            mask=is_row[:, None] & is_d[None, :],
        )


def add_attention(
    x_bhwc: Tensor,
    norm: Norm,
    query_cc: Tensor,
    query_bias_c: Tensor,
    kv_bmf: Tensor,
    out_cc: Tensor,
    num_heads: int,
) -> None:
    """Add to the stream, in place, what its tokens attend to; the output's bias is left out.

    With one head its output goes straight to the stream; with several it is written first.

    Args:
        x_bhwc: The stream, contiguous; C at most 128.
        norm: What attention norms it with.
        query_cc: (C, C), as `nn.Linear` has it, to queries whose scores are powers of two.
        query_bias_c: float32 (C,).
        kv_bmf: (B, M, 2 C), keys, then values; of each the heads side by side.
        out_cc: (C, C), as `nn.Linear` has it, from the heads' outputs.
        num_heads: How many.
    """
    b, h, w, c = x_bhwc.shape
    own = c // num_heads
    tile = ATTENTION if own >= 64 else THIN_ATTENTION
    out_bhwc = x_bhwc if num_heads == 1 else torch.empty_like(x_bhwc)
    launch(
        _attend, (triton.cdiv(h * w, tile["ROWS"]), b, num_heads),
        x_bhwc, norm.shift, norm.scale, norm.bias, query_cc, query_bias_c, kv_bmf, out_cc,
        out_bhwc, h * w, kv_bmf.shape[1], c, norm.eps,
        IS_ONLY=num_heads == 1, WIDTH=padded(own), OWN=own, CHANNELS=padded(c),
        IS_EVEN=kv_bmf.shape[1] % tile["KEYS"] == 0, **tile,
    )  # fmt: skip
    if num_heads > 1:
        x_bhwc.view(-1, c).addmm_(out_bhwc.view(-1, c), out_cc.T)
