"""Compiled loops of the model's first and last steps on a CPU.

Pixels to numbers; the heads' sum; class ids from logits.

Compiled by Numba when first called (seconds), and kept in its cache from then on. No build step.

Shapes, also at the end of names: h and w the grid's sides, k classes, y and x the output's sides.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from segformer3d.compiling import bits_as_float, compiled, float_as_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    I32 = NDArray[np.int32]
    U8 = NDArray[np.uint8]

_LEAST = np.float32(-124.0)  # smaller powers of two are no normal float32
_TO_INTEGERS = np.float32(1.5 * 2**23)  # added to a float, it leaves the nearest integer's bits
_LOG2_E = np.float32(1.4426950408889634)
# 2^r for |r| <= 1/2, exact at 0 and within 2e-7 in float32; by least squares of the relative error.
_E1, _E2 = np.float32(0.693147), np.float32(0.24022241)
_E3, _E4, _E5 = np.float32(0.05550735), np.float32(0.009671619), np.float32(0.001326459)


@compiled
def power_of_two(t: np.float32) -> np.float32:
    """2^t for t below 127, within 2e-7; 2^-124 for smaller ones. Vectorises, unlike libm's."""
    return power_of_two_near_zero(_LEAST if t < _LEAST else t)


@compiled
def power_of_two_near_zero(t: np.float32) -> np.float32:
    """2^t for t from -124 to 127, within 2e-7.

    2^t = 2^n 2^r with n = round(t), which is added to the exponent's bits.
    """
    shifted = t + _TO_INTEGERS
    r = t - (shifted - _TO_INTEGERS)
    p = ((((_E5 * r + _E4) * r + _E3) * r + _E2) * r + _E1) * r + np.float32(1)
    power: np.float32 = bits_as_float(float_as_bits(p) + (float_as_bits(shifted) << np.int32(23)))
    return power


def resolve(logits_hwk: F32, ids_yx: U8) -> tuple[float, float]:
    """Resize logits bilinearly and take each pixel's largest class, without the resized planes.

    A pixel's resized logits are a convex combination of its four neighbours': where those agree
    on the largest class, it is the pixel's too. Only where they do not are logits resized.

    Args:
        logits_hwk: float32 (h, w, K), contiguous, finite, K at most 255.
        ids_yx: uint8 of the size wanted; filled in.

    Returns:
        Of the grid, the mean largest class probability and the mean class entropy in nats.
    """
    best_hw, confidence, entropy = _grid(logits_hwk)
    height, width = logits_hwk.shape[:2]
    rows, columns = _taps((height,), ids_yx.shape[0]), _taps((width,), ids_yx.shape[1])
    _resolve(logits_hwk, best_hw, *rows, *columns, ids_yx)
    return confidence, entropy


@lru_cache(maxsize=32)
def _taps(sources: tuple[int, ...], target: int) -> tuple[I32, I32, F32]:
    """Neighbours and the second one's share, as torch's bilinear resize without aligned corners.

    Each (len(sources), target); kept, since every frame and every band asks for the same.
    """
    sides = np.array(sources, np.int32)[:, None]
    steps = (np.arange(target, dtype=np.float32) + 0.5)[None]
    places = np.maximum(steps * (sides / target).astype(np.float32) - np.float32(0.5), 0)
    first = np.minimum(places.astype(np.int32), sides - 1)
    second = np.minimum(first + 1, sides - 1)
    return first, second, (places - first).astype(np.float32)


@compiled
def _grid(logits_hwk: F32) -> tuple[U8, float, float]:
    """Largest class, mean largest probability, mean entropy (log sum - sum of p times logit).

    A row at a time, classes first, so that every inner loop runs along the row and vectorises.
    """
    height, width, num_classes = logits_hwk.shape
    best_hw = np.empty((height, width), np.uint8)
    row_kx = np.empty((num_classes, width), np.float32)
    largest = np.empty(width, np.float32)
    total, moment = np.empty(width, np.float32), np.empty(width, np.float32)
    confidences, entropies = 0.0, 0.0
    for y in range(height):
        best = best_hw[y]
        for x in range(width):
            for k in range(num_classes):
                row_kx[k, x] = logits_hwk[y, x, k]
        largest[:] = row_kx[0]
        best[:] = 0
        for k in range(1, num_classes):
            for x in range(width):
                is_larger = row_kx[k, x] > largest[x]
                largest[x] = row_kx[k, x] if is_larger else largest[x]
                best[x] = np.uint8(k) if is_larger else best[x]
        total[:] = 0
        moment[:] = 0
        for k in range(num_classes):
            for x in range(width):
                below = row_kx[k, x] - largest[x]
                e = power_of_two(below * _LOG2_E)
                total[x] += e
                moment[x] += e * below
        for x in range(width):
            confidences += 1 / total[x]
            entropies += np.log(total[x]) - moment[x] / total[x]
    number = height * width
    return best_hw, confidences / number, entropies / number


@compiled
def _resolve(
    logits_hwk: F32,
    best_hw: U8,
    tops: I32,
    bottoms: I32,
    down: F32,
    lefts: I32,
    rights: I32,
    across: F32,
    ids_yx: U8,
) -> None:
    """Fill in `ids_yx`; taps are (1, height or width), their shares `down` and `across`."""
    height, width = ids_yx.shape
    plain, undecided = np.empty(width, np.uint8), np.empty(width, np.int32)
    num_classes = logits_hwk.shape[2]
    mixed = np.empty(num_classes, np.float32)
    number = 0
    for y in range(height):
        top, bottom = tops[0, y], bottoms[0, y]
        # Where the output is larger, neighbouring rows lie between the same two of the grid.
        if y == 0 or top != tops[0, y - 1] or bottom != bottoms[0, y - 1]:
            number = _decide(best_hw[top], best_hw[bottom], lefts, rights, plain, undecided)
        ids_yx[y] = plain
        for index in range(number):
            x = undecided[index]
            left, right, dx, dy = lefts[0, x], rights[0, x], across[0, x], down[0, y]
            for k in range(num_classes):
                upper = logits_hwk[top, left, k]
                upper += dx * (logits_hwk[top, right, k] - upper)
                lower = logits_hwk[bottom, left, k]
                lower += dx * (logits_hwk[bottom, right, k] - lower)
                mixed[k] = upper + dy * (lower - upper)
            best, largest = 0, mixed[0]
            for k in range(1, num_classes):
                is_larger = mixed[k] > largest
                largest = mixed[k] if is_larger else largest
                best = k if is_larger else best
            ids_yx[y, x] = best


@compiled
def _decide(upper_w: U8, lower_w: U8, lefts: I32, rights: I32, plain_x: U8, undecided: I32) -> int:
    """Fill in a row as far as all four neighbours agree; return how many pixels are undecided."""
    number = 0
    for x in range(plain_x.shape[0]):
        left, right = lefts[0, x], rights[0, x]
        best = upper_w[left]
        plain_x[x] = best
        undecided[number] = x
        agree = best == upper_w[right] and best == lower_w[left] and best == lower_w[right]
        number += int(not agree)
    return number


def normalise(frames_bhwc: U8, scale_c: F32, bias_c: F32, out_bhwc: F32) -> None:
    """Turn pixels into `scale_c * pixel + bias_c`.

    Args:
        frames_bhwc: uint8 (B, H, W, 3), contiguous.
        scale_c: float32 (3,).
        bias_c: float32 (3,).
        out_bhwc: float32 (B, H, W, 3), contiguous; filled in.
    """
    width = frames_bhwc.shape[2]
    scale_x, bias_x = np.tile(scale_c, width), np.tile(bias_c, width)
    rows = (-1, 3 * width)
    _normalise(frames_bhwc.reshape(rows), scale_x, bias_x, out_bhwc.reshape(rows))


@compiled
def _normalise(pixels_yx: U8, scale_x: F32, bias_x: F32, out_yx: F32) -> None:
    for y in range(out_yx.shape[0]):
        for x in range(out_yx.shape[1]):
            out_yx[y, x] = np.float32(pixels_yx[y, x]) * scale_x[x] + bias_x[x]


def add_resized_relu(hidden_ywc: F32, lows: tuple[F32, F32, F32], top: int, height: int) -> None:
    """Add bilinearly resized maps to a band of rows, and cut off what is below 0, in place.

    Args:
        hidden_ywc: float32 (rows, w, C), contiguous: rows `top` onwards of a grid of `height` rows.
        lows: float32 (h_s, w_s, C) each, contiguous: the maps to resize to (height, w, C).
        top: The band's first row.
        height: Rows of the whole grid.
    """
    rows = _taps(tuple(low.shape[0] for low in lows), height)
    columns = _taps(tuple(low.shape[1] for low in lows), hidden_ywc.shape[1])
    _add_resized_relu(hidden_ywc, *lows, top, *rows, *columns)


@compiled
def _add_resized_relu(
    hidden_ywc: F32,
    low_1: F32,
    low_2: F32,
    low_3: F32,
    top: int,
    firsts: I32,
    seconds: I32,
    downs: F32,
    lefts: I32,
    rights: I32,
    acrosses: F32,
) -> None:
    """Blend two rows of each map first, then two pixels of those; taps are (3, height or w)."""
    width, channels = hidden_ywc.shape[1:]
    row_1 = np.empty(low_1.shape[1:], np.float32)
    row_2 = np.empty(low_2.shape[1:], np.float32)
    row_3 = np.empty(low_3.shape[1:], np.float32)
    for y in range(hidden_ywc.shape[0]):
        at = top + y
        _blend(low_1[firsts[0, at]], low_1[seconds[0, at]], downs[0, at], row_1)
        _blend(low_2[firsts[1, at]], low_2[seconds[1, at]], downs[1, at], row_2)
        _blend(low_3[firsts[2, at]], low_3[seconds[2, at]], downs[2, at], row_3)
        for x in range(width):
            pixel = hidden_ywc[y, x]
            left_1, right_1, share_1 = row_1[lefts[0, x]], row_1[rights[0, x]], acrosses[0, x]
            left_2, right_2, share_2 = row_2[lefts[1, x]], row_2[rights[1, x]], acrosses[1, x]
            left_3, right_3, share_3 = row_3[lefts[2, x]], row_3[rights[2, x]], acrosses[2, x]
            for c in range(channels):
                value = pixel[c]
                value += left_1[c] + share_1 * (right_1[c] - left_1[c])
                value += left_2[c] + share_2 * (right_2[c] - left_2[c])
                value += left_3[c] + share_3 * (right_3[c] - left_3[c])
                pixel[c] = max(value, np.float32(0))


@compiled
def _blend(first: F32, second: F32, share: float, out: F32) -> None:
    for x in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[x, c] = first[x, c] + share * (second[x, c] - first[x, c])
