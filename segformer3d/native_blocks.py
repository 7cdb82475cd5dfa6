"""Compiled loops of the encoder's blocks on a CPU: norm, softmax, depthwise convolution with GELU.

A value that is not finite stays so in what comes of it: `Predictor` looks for it at the end.

Shapes, also at the end of names: n tokens, c channels, m keys, a heads, y and x a band of the grid.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from segformer3d.compiling import bits_as_float, compiled, float_as_bits
from segformer3d.native import power_of_two, power_of_two_near_zero

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

_SIGN_LESS = np.int32(0x7FFFFFFF)
_HALF, _ONE = np.float32(0.5), np.float32(1)
_BLOCK = 4  # pixels that share a load of the convolution's weights

# Half of erf(x / sqrt 2) is x P(t), t = 2 (x / 5.2)^2 - 1, within 7e-8 for |x| < 5.2, beyond which
# it is 1/2 within 1e-7. Fitted by iteratively reweighted least squares on Chebyshev nodes; a
# polynomial, since a division costs as much as 16 products.
_REACH, _TO_T = np.float32(5.2), np.float32(2 / 5.2**2)
_P0, _P1, _P2 = np.float32(0.1359500), np.float32(-0.067743666), np.float32(0.05002452)
_P3, _P4, _P5 = np.float32(-0.03992982), np.float32(0.031989958), np.float32(-0.02472363)
_P6, _P7, _P8 = np.float32(0.017954787), np.float32(-0.012505119), np.float32(0.008559969)
_P9, _P10, _P11 = np.float32(-0.004789042), np.float32(0.0018001216), np.float32(-0.0012214907)
_P12, _P13 = np.float32(0.0012685114), np.float32(-0.0004812781)


@partial(compiled, reassociate=True)
def layer_norm(x_nc: F32, shift_c: F32, scale_c: F32, bias_c: F32, eps: float, out_nc: F32) -> None:
    """Normalise each row of `x_nc + shift_c`, times `scale_c` plus `bias_c`, into `out_nc`.

    Args:
        x_nc: float32 (N, C), contiguous.
        shift_c: Added to each row first: biases that earlier products have left out.
        scale_c: The norm's weight.
        bias_c: The norm's bias.
        eps: Added to the variance.
        out_nc: Filled in; may be `x_nc`.
    """
    number, channels = x_nc.shape
    share = _ONE / np.float32(channels)
    for n in range(number):
        # A loop that sums and stores is compiled twice, in vectors and, for where arrays might
        # overlap, one by one; which one runs hangs on addresses, and they round differently.
        total = np.float32(0)
        for c in range(channels):
            total += x_nc[n, c] + shift_c[c]
        mean = total * share
        squares = np.float32(0)
        for c in range(channels):
            value = x_nc[n, c] + shift_c[c] - mean
            squares += value * value
        factor = _ONE / np.sqrt(squares * share + np.float32(eps))
        for c in range(channels):
            value = x_nc[n, c] + shift_c[c] - mean
            out_nc[n, c] = value * factor * scale_c[c] + bias_c[c]


@partial(compiled, reassociate=True)
def are_within(x_nc: F32, limits_a: F32) -> bool:
    """Whether every row's length is within a limit, for each of the heads that share its channels.

    Args:
        x_nc: float32 (N, C), contiguous.
        limits_a: float32 (A,), A a divisor of C; nothing is within what is no number.
    """
    number, channels = x_nc.shape
    width = channels // limits_a.shape[0]
    for n in range(number):
        for a in range(limits_a.shape[0]):
            squares = np.float32(0)
            for c in range(a * width, (a + 1) * width):
                squares += x_nc[n, c] * x_nc[n, c]
            if not np.sqrt(squares) <= limits_a[a]:
                return False
    return True


@compiled
def raise_two(scores_nm: F32, shift_m: F32, are_small: bool, totals_n: F32) -> None:
    """Replace scores by 2 to the power of `scores_nm + shift_m`, up to a factor a row.

    Args:
        scores_nm: float32 (N, M), contiguous.
        shift_m: float32 (M,).
        are_small: Whether no power can leave float32's range. Otherwise each row is divided by
            its largest one.
        totals_n: Filled in: the rows' sums.
    """
    number, keys = scores_nm.shape
    for n in range(number):
        row = scores_nm[n]
        total = np.float32(0)
        if are_small:
            for m in range(keys):
                power = power_of_two_near_zero(row[m] + shift_m[m])
                row[m] = power
                total = _sum(total, power)
        else:
            largest = -_SIGN_LESS
            for m in range(keys):
                largest = max(largest, _ordered(float_as_bits(row[m] + shift_m[m])))
            top = bits_as_float(_ordered(largest))
            for m in range(keys):
                power = power_of_two((row[m] + shift_m[m]) - top)
                row[m] = power
                total = _sum(total, power)
        totals_n[n] = total


@compiled
def _ordered(bits: np.int32) -> np.int32:
    """Map a float's bits to an integer of the same order, and back.

    The largest of integers vectorises; what is no number comes out as the largest.
    """
    return bits ^ ((bits >> np.int32(31)) & _SIGN_LESS)


@partial(compiled, reassociate=True)
def _sum(total: np.float32, value: np.float32) -> np.float32:
    return total + value


@compiled
def divide_heads(x_nc: F32, totals_an: F32) -> None:
    """Divide each row's channels, which A heads share, by the heads' totals, in place."""
    number, channels = x_nc.shape
    heads = totals_an.shape[0]
    width = channels // heads
    for n in range(number):
        for a in range(heads):
            share = _ONE / totals_an[a, n]
            for c in range(a * width, (a + 1) * width):
                x_nc[n, c] *= share


@compiled
def add_divided(x_nc: F32, y_nc: F32, totals_n: F32) -> None:
    """Add each row of `y_nc`, divided by its total, to `x_nc`."""
    number, channels = x_nc.shape
    for n in range(number):
        share = _ONE / totals_n[n]
        for c in range(channels):
            x_nc[n, c] += y_nc[n, c] * share


@compiled
def convolve_gelu(
    band_yxc: F32, weights_kc: F32, biases: F32, top: int, height: int, out_yxc: F32
) -> None:
    """Convolve each channel by 3x3, add a bias that knows the grid's rims, and take the GELU.

    Args:
        band_yxc: float32 (rows + 2, W, C), contiguous: rows `top` - 1 onwards of a grid, zeros
            outside of it.
        weights_kc: float32 (9, C).
        biases: float32 (2, 2, 2, 2, C): by whether there is a row above and below, and a column
            to the left and to the right.
        top: Place in the grid of the first row that comes out.
        height: Rows of the whole grid.
        out_yxc: (rows, W, C), contiguous; filled in.
    """
    rows, width, _ = out_yxc.shape
    for y in range(rows):
        around = biases[int(top + y > 0), int(top + y < height - 1)]
        window, out_xc = band_yxc[y : y + 3], out_yxc[y]
        if width < _BLOCK + 2:
            for x in range(width):
                _convolve_pixel(window, weights_kc, around, x, out_xc)
            continue
        _convolve_pixel(window, weights_kc, around, 0, out_xc)
        _convolve_pixel(window, weights_kc, around, width - 1, out_xc)
        for x in range(1, width - 1, _BLOCK):
            # The last block overlaps the one before it rather than reach beyond the rim.
            _convolve_block(window, weights_kc, around[1, 1], min(x, width - 1 - _BLOCK), out_xc)


@compiled
def _convolve_pixel(window: F32, weights_kc: F32, around: F32, x: int, out_xc: F32) -> None:
    width, channels = out_xc.shape
    bias = around[int(x > 0), int(x < width - 1)]
    total = np.empty(channels, np.float32)
    total[:] = bias
    for row in range(3):
        for column in range(max(x - 1, 0), min(x + 2, width)):
            pixel, weight = window[row, column], weights_kc[3 * row + column - x + 1]
            for c in range(channels):
                total[c] += pixel[c] * weight[c]
    for c in range(channels):
        out_xc[x, c] = _gelu(total[c])


@compiled
def _convolve_block(window: F32, weights_kc: F32, bias: F32, x: int, out_xc: F32) -> None:
    """Four pixels at a time: each load of a weight or of a pixel serves several of them."""
    a, b, d = window[0], window[1], window[2]
    a0, a1, a2, a3, a4, a5 = a[x - 1], a[x], a[x + 1], a[x + 2], a[x + 3], a[x + 4]
    b0, b1, b2, b3, b4, b5 = b[x - 1], b[x], b[x + 1], b[x + 2], b[x + 3], b[x + 4]
    d0, d1, d2, d3, d4, d5 = d[x - 1], d[x], d[x + 1], d[x + 2], d[x + 3], d[x + 4]
    w0, w1, w2 = weights_kc[0], weights_kc[1], weights_kc[2]
    w3, w4, w5 = weights_kc[3], weights_kc[4], weights_kc[5]
    w6, w7, w8 = weights_kc[6], weights_kc[7], weights_kc[8]
    out0, out1, out2, out3 = out_xc[x], out_xc[x + 1], out_xc[x + 2], out_xc[x + 3]
    for c in range(out_xc.shape[1]):
        p = q = r = s = bias[c]
        p, q, r, s = _taps(a0, a1, a2, a3, w0, c, p, q, r, s)
        p, q, r, s = _taps(a1, a2, a3, a4, w1, c, p, q, r, s)
        p, q, r, s = _taps(a2, a3, a4, a5, w2, c, p, q, r, s)
        p, q, r, s = _taps(b0, b1, b2, b3, w3, c, p, q, r, s)
        p, q, r, s = _taps(b1, b2, b3, b4, w4, c, p, q, r, s)
        p, q, r, s = _taps(b2, b3, b4, b5, w5, c, p, q, r, s)
        p, q, r, s = _taps(d0, d1, d2, d3, w6, c, p, q, r, s)
        p, q, r, s = _taps(d1, d2, d3, d4, w7, c, p, q, r, s)
        p, q, r, s = _taps(d2, d3, d4, d5, w8, c, p, q, r, s)
        out0[c], out1[c], out2[c], out3[c] = _gelu(p), _gelu(q), _gelu(r), _gelu(s)


@compiled
def _taps(
    first: F32,
    second: F32,
    third: F32,
    fourth: F32,
    weight: F32,
    c: int,
    p: np.float32,
    q: np.float32,
    r: np.float32,
    s: np.float32,
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    w = weight[c]
    return p + first[c] * w, q + second[c] * w, r + third[c] * w, s + fourth[c] * w


@compiled
def _gelu(x: np.float32) -> np.float32:
    """Half x (1 + erf(x / sqrt 2)): Hendrycks and Gimpel 2016, arXiv 1606.08415, eq. 1."""
    z = _REACH if x > _REACH else (-_REACH if x < -_REACH else x)
    t = z * z * _TO_T - _ONE
    p = (((_P13 * t + _P12) * t + _P11) * t + _P10) * t + _P9
    p = (((p * t + _P8) * t + _P7) * t + _P6) * t + _P5
    p = ((((p * t + _P4) * t + _P3) * t + _P2) * t + _P1) * t + _P0
    return x * (_HALF + z * p)
