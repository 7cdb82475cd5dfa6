"""The Mix Transformer for inference on a CPU: the same function, rearranged exactly.

- The residual stream is summed up in place by the matrix products, without their biases: what
  these would have added is a vector that the next norm adds (`shift`).
- Attention goes by tiles of queries whose scores stay in the cache. Biases of keys change no
  softmax, those of queries become one number per key, those of values a bias of the output. With
  one head, queries and output are folded into keys and values: `x Wq (r Wk)^T = x (r Wk Wq^T)^T`.
- The Mix-FFN goes by bands of rows, so that its hidden channels, four times as many, stay in the
  cache; `fc1`'s bias, seen through the convolution's zero padding, becomes one that knows the rims.

Shapes, also at the end of names: n = h * w tokens, c channels, f hidden channels, m keys, a heads,
d channels of one, t tokens of a tile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from segformer3d.native_blocks import (
    add_divided,
    are_within,
    convolve_gelu,
    divide_heads,
    layer_norm,
    raise_two,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from segformer3d.encoder import MixTransformer
    from segformer3d.layers import Block, EfficientAttention, MixFFN, Stage

TILE_FLOATS = 2**17  # scores of a tile: half a megabyte, a part of a core's cache
BAND_FLOATS = 2**18  # hidden values of a band: a megabyte
SCORE_MAX = 100.0  # of float32's 127 powers of two; what is left is for sums over keys
RIM = 2  # rows beside a band that its convolution sees


class CpuEncoder:
    """A trained Mix Transformer, ready to encode on a CPU; keeps no link to where it came from."""

    def __init__(self, encoder: MixTransformer) -> None:
        """Fold the parameters in float64."""
        self.stages = [_Stage(cast("Stage", stage)) for stage in encoder.stages]

    @torch.no_grad()
    def __call__(self, x_bchw: Tensor) -> list[Tensor]:
        """Encode float32 (B, 3, H, W); map s is (B, embed_dims[s], H / 4 / 2**s, W / 4 / 2**s)."""
        maps: list[Tensor] = []
        for stage in self.stages:
            samples_bhwc = [stage(x_bchw[index : index + 1]) for index in range(len(x_bchw))]
            x_bhwc = samples_bhwc[0] if len(samples_bhwc) == 1 else torch.cat(samples_bhwc)
            x_bchw = x_bhwc.permute(0, 3, 1, 2)
            maps.append(x_bchw)
        return maps


class _Norm:
    """A layer norm whose input lacks biases that were never added."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.scale = _array(norm.weight)
        self.bias = _array(norm.bias)
        self.eps = norm.eps

    def __call__(self, x_nc: Tensor, shift: NDArray[np.float32], out_nc: Tensor) -> None:
        layer_norm(x_nc.numpy(), shift, self.scale, self.bias, self.eps, out_nc.numpy())


class _Stage:
    """A patch embedding, blocks and a closing norm, for one sample at a time."""

    def __init__(self, stage: Stage) -> None:
        proj = stage.patch_embed.proj
        self.weight = _channels_last(proj.weight)
        self.bias = _array(proj.get_parameter("bias"))
        self.stride, self.padding = proj.stride, proj.padding
        self.patch_norm = _Norm(stage.patch_embed.norm)
        self.blocks: list[_Block] = []
        shift = torch.zeros(proj.out_channels, dtype=torch.float64)
        for block in stage.blocks:
            self.blocks.append(_Block(cast("Block", block), shift))
            shift = self.blocks[-1].shift_after
        self.shift = _array(shift)
        self.norm = _Norm(stage.norm)

    def __call__(self, x_1chw: Tensor) -> Tensor:
        """Turn (1, C, H, W) into this stage's (1, h, w, C')."""
        patches = functional.conv2d(x_1chw, self.weight, None, self.stride, self.padding)
        x_1hwc = patches.permute(0, 2, 3, 1).contiguous()
        _, height, width, channels = x_1hwc.shape
        x_nc = x_1hwc.view(-1, channels)
        self.patch_norm(x_nc, self.bias, x_nc)
        y_nc = torch.empty_like(x_nc)
        for block in self.blocks:
            block(x_nc, y_nc, height, width)
        self.norm(x_nc, self.shift, y_nc)
        return y_nc.view(x_1hwc.shape)


class _Block:
    """Adds attention and Mix-FFN to the residual stream."""

    def __init__(self, block: Block, shift: Tensor) -> None:
        self.norm1, self.norm2 = _Norm(block.norm1), _Norm(block.norm2)
        self.attention = _Attention(block.attn, block.norm1)
        self.ffn = _MixFFN(block.ffn)
        middle = shift + self.attention.bias
        self.shift1, self.shift2 = _array(shift), _array(middle)
        self.shift_after = middle + self.ffn.bias

    def __call__(self, x_nc: Tensor, y_nc: Tensor, height: int, width: int) -> None:
        """Transform the stream in place; `y_nc` is room for the norms' outputs."""
        self.norm1(x_nc, self.shift1, y_nc)
        self.attention.add_to(x_nc, y_nc, height, width)
        self.norm2(x_nc, self.shift2, y_nc)
        self.ffn.add_to(x_nc, y_nc, height, width)


class _Attention:
    """Efficient self-attention, by tiles of queries; `bias` is left out of what it adds."""

    def __init__(self, attention: EfficientAttention, norm: nn.LayerNorm) -> None:
        """Fold an attention whose input comes from `norm`."""
        self.num_heads = attention.num_heads
        q, q_bias = _double(attention.q)
        k, v = attention.kv.weight.double().chunk(2)
        _, v_bias = attention.kv.bias.double().chunk(2)
        proj, proj_bias = _double(attention.proj)
        self.bias = proj @ v_bias + proj_bias
        # Scores come out as powers of two.
        k = k * (math.log2(math.e) * (len(k) // self.num_heads) ** -0.5)
        heads = (self.num_heads, -1, k.shape[1])
        # What a bias of the queries adds to the scores of each head's keys.
        q_bias_ad = q_bias.view(self.num_heads, -1)
        self.query_bias = torch.einsum("ad,adc->ac", q_bias_ad, k.view(heads)).float()
        self.query = self.out = None
        # What a norm gives is no longer than this, and so neither are the queries.
        longest = norm.weight.abs().max().double() * len(q) ** 0.5 + norm.bias.double().norm()
        if self.num_heads == 1:
            k, v = q.T @ k, proj @ v
            self.longest_a = longest.float().view(1)
        else:
            self.query, self.out = _transposed(q), _transposed(proj)
            sizes_a = torch.linalg.matrix_norm(q.view(heads), 2)
            self.longest_a = (longest * sizes_a).float()
        self.key, self.value = k.float().contiguous(), _transposed(v)
        self.reduction = _Reduction(attention) if attention.sr is not None else None

    def add_to(self, x_nc: Tensor, y_nc: Tensor, height: int, width: int) -> None:
        """Add what `y_nc` attends to, over the whole grid, to `x_nc`; `y_nc` is lost."""
        source_mc = y_nc
        if self.reduction is not None:
            source_mc = self.reduction(y_nc.view(1, height, width, -1))
        keys_cm = self.key @ source_mc.T
        shifts_am = self.query_bias @ source_mc.T
        values_mc = source_mc @ self.value
        queries_nc = y_nc if self.query is None else y_nc @ self.query
        totals_an = self._attend(queries_nc, keys_cm, shifts_am, values_mc, y_nc)
        if self.out is None:
            add_divided(x_nc.numpy(), y_nc.numpy(), totals_an[0])
        else:
            divide_heads(y_nc.numpy(), totals_an)
            x_nc.addmm_(y_nc, self.out)

    def _attend(
        self,
        queries_nc: Tensor,
        keys_cm: Tensor,
        shifts_am: Tensor,
        values_mc: Tensor,
        out_nc: Tensor,
    ) -> NDArray[np.float32]:
        """Attend with every head, up to the totals that it returns, (A, N).

        The output may lie where the queries do.
        """
        are_small = self._are_small(queries_nc, keys_cm, shifts_am)
        num_queries, num_keys = len(queries_nc), len(values_mc)
        tile = max(1, TILE_FLOATS // num_keys)
        scores_tm = torch.empty(min(tile, num_queries), num_keys)
        scores = scores_tm.numpy()
        totals_an = np.empty((self.num_heads, num_queries), np.float32)
        keys_adm = keys_cm.view(self.num_heads, -1, num_keys)
        width = keys_adm.shape[1]
        for head, keys_dm in enumerate(keys_adm):
            own = slice(head * width, (head + 1) * width)
            queries_nd, values_md, out_nd = queries_nc[:, own], values_mc[:, own], out_nc[:, own]
            shift_m, totals_n = shifts_am[head].numpy(), totals_an[head]
            for start in range(0, num_queries, tile):
                stop = min(start + tile, num_queries)
                powers_tm = scores_tm[: stop - start]
                torch.mm(queries_nd[start:stop], keys_dm, out=powers_tm)
                raise_two(scores[: stop - start], shift_m, are_small, totals_n[start:stop])
                torch.mm(powers_tm, values_md, out=out_nd[start:stop])
        return totals_an

    def _are_small(self, queries_nc: Tensor, keys_cm: Tensor, shifts_am: Tensor) -> bool:
        """Whether no score can be far from 0: a product is at most the lengths' product."""
        keys_adm = keys_cm.view(self.num_heads, -1, keys_cm.shape[1])
        keys_a = keys_adm.square().sum(1).amax(1).sqrt()  # a quarter of the time of `norm`
        limits_a = (SCORE_MAX - shifts_am.abs().amax(1)) / keys_a
        if (self.longest_a <= limits_a).all():
            return True
        return are_within(queries_nc.numpy(), limits_a.numpy())


class _Reduction:
    """The grid that keys and values come from, `stride` times smaller per side."""

    def __init__(self, attention: EfficientAttention) -> None:
        if attention.sr is None or attention.sr_norm is None:
            raise ValueError("attention over the whole grid has no reduction")
        self.weight = _channels_last(attention.sr.weight)
        self.bias = _array(attention.sr.get_parameter("bias"))
        self.stride = attention.sr.stride
        self.norm = _Norm(attention.sr_norm)

    def __call__(self, y_1hwc: Tensor) -> Tensor:
        """Turn (1, h, w, C) into (M, C)."""
        y_1chw = y_1hwc.permute(0, 3, 1, 2)
        reduced_1chw = functional.conv2d(y_1chw, self.weight, None, self.stride)
        reduced_mc = reduced_1chw.permute(0, 2, 3, 1).contiguous().view(-1, y_1hwc.shape[-1])
        self.norm(reduced_mc, self.bias, reduced_mc)
        return reduced_mc


class _MixFFN:
    """The feed-forward network, by bands of rows; `bias` is left out of what it adds."""

    def __init__(self, ffn: MixFFN) -> None:
        fc1, fc1_bias = _double(ffn.fc1)
        fc2, self.bias = _double(ffn.fc2)
        conv, conv_bias = _double(ffn.conv)
        self.fc1, self.fc2 = _transposed(fc1), _transposed(fc2)
        self.conv = _array(conv.flatten(1).T.contiguous())
        self.biases = _rim_biases(conv[:, 0], fc1_bias, conv_bias)

    def add_to(self, x_nc: Tensor, y_nc: Tensor, height: int, width: int) -> None:
        """Add what it makes of `y_nc`, over the whole grid, to `x_nc`."""
        num_hidden = self.fc1.shape[1]
        rows = min(height, max(1, BAND_FLOATS // (width * num_hidden)))
        # A band and the row on either side of it; outside of the grid they are 0.
        band_yxf = torch.empty(rows + RIM, width, num_hidden)
        hidden_yxf = torch.empty(rows, width, num_hidden)
        band, hidden = band_yxf.numpy(), hidden_yxf.numpy()
        band[0] = 0
        ready = 1  # rows of the band that are there already
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            last = bottom - top + RIM
            fresh = slice((top + ready - 1) * width, min(bottom + 1, height) * width)
            end = ready + (fresh.stop - fresh.start) // width
            torch.mm(y_nc[fresh], self.fc1, out=band_yxf[ready:end].view(-1, num_hidden))
            band[end:last] = 0
            done = bottom - top
            convolve_gelu(band[:last], self.conv, self.biases, top, height, hidden[:done])
            hidden_tf = hidden_yxf[:done].view(-1, num_hidden)
            x_nc[top * width : bottom * width].addmm_(hidden_tf, self.fc2)
            band[:RIM] = band[last - RIM : last].copy()
            ready = RIM


def _rim_biases(conv_fyx: Tensor, before_f: Tensor, after_f: Tensor) -> NDArray[np.float32]:
    """What biases before and after the convolution come to, (2, 2, 2, 2, F).

    By whether there is a row above and below, and a column to the left and to the right: beyond the
    rim the convolution sees zeros, without the bias.
    """
    biases = torch.empty(2, 2, 2, 2, len(before_f), dtype=torch.float64)
    for above, below, left, right in torch.cartesian_prod(*[torch.arange(2)] * 4).tolist():
        seen = conv_fyx[:, 1 - above : 2 + below, 1 - left : 2 + right].sum((1, 2))
        biases[above, below, left, right] = after_f + seen * before_f
    return _array(biases)


def _double(layer: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    return weight.detach().double(), bias.detach().double()


def _transposed(weight: Tensor) -> Tensor:
    return weight.detach().T.float().contiguous()


def _channels_last(weight: Tensor) -> Tensor:
    """Lay a convolution's weights out as oneDNN's fast kernels want them.

    `contiguous(memory_format=...)` leaves the strides of sides of 1 as they are, and takes a
    depthwise convolution's weights for something else: 20 times slower.
    """
    return (
        weight.detach()
        .float()
        .permute(0, 2, 3, 1)
        .clone(memory_format=torch.contiguous_format)
        .permute(0, 3, 1, 2)
    )


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().float().clone().numpy()
    return array
