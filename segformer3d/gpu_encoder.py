"""The Mix Transformer on a GPU, in bfloat16: the same function, rearranged.

- The residual stream is summed up in place by matrix products, without their biases: what these
  would have added is a vector that the next norm adds.
- Narrow stages, whose maps are the largest, are bound by memory: one kernel goes from the stream
  to what its tokens attend to, with one head to the sum with it; queries and scores stay on the
  chip.
- In wide ones, bound by operations, cuBLAS and the attention of torch do the products.
- Between the two products of a Mix-FFN one kernel convolves and activates.

Nothing here waits for the device, so that a CUDA graph can hold it.

Shapes, also at the end of names: b batch, h and w a grid's sides, c channels, f features of a
product, n tokens, m reduced tokens, a heads, d channels of one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from segformer3d.gpu_blocks import (
    TAP_BYTES,
    TAPS,
    Norm,
    add_attention,
    depthwise_gelu,
    embed_pixels,
    layer_norm,
    norm_linear,
    reduce_patches,
)

if TYPE_CHECKING:
    from segformer3d.config import Preprocessing
    from segformer3d.encoder import MixTransformer
    from segformer3d.layers import Block, EfficientAttention, MixFFN, PatchEmbedding, Stage

NARROW = 128  # channels: what a program's tile holds beside its sums
CHANNELS = 3


class GpuEncoder:
    """A trained Mix Transformer, ready to encode pixels; keeps no link to where it came from."""

    def __init__(
        self, encoder: MixTransformer, preprocessing: Preprocessing, dtype: torch.dtype
    ) -> None:
        """Copy the parameters, on their device."""
        first, *others = (cast("Stage", stage) for stage in encoder.stages)
        self._stages = [_Stage(first, _Stem(first.patch_embed, preprocessing, dtype), dtype)]
        self._stages += [
            _Stage(
                stage, _Convolution(stage.patch_embed.proj, stage.patch_embed.norm, dtype), dtype
            )
            for stage in others
        ]

    def __call__(self, pixels_bhwc: Tensor) -> list[Tensor]:
        """Encode uint8 RGB (B, H, W, 3); map s is (B, H / 4 / 2**s, W / 4 / 2**s, dims[s])."""
        maps = [pixels_bhwc]
        for stage in self._stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class _Stage:
    """A patch embedding, blocks and a closing norm."""

    def __init__(self, stage: Stage, embed: _Stem | _Convolution, dtype: torch.dtype) -> None:
        self.embed = embed
        shift = torch.zeros_like(stage.norm.weight, dtype=torch.float64)
        self.blocks = []
        for module in stage.blocks:
            block = cast("Block", module)
            middle = shift + _bias(block.attn.proj)
            is_narrow = block.attn.sr is not None and len(shift) <= NARROW
            attention = (_NarrowAttention if is_narrow else _WideAttention)(
                block.attn, _norm(block.norm1, shift), dtype
            )
            ffn = _MixFFN(block.ffn, _norm(block.norm2, middle), dtype, is_narrow=is_narrow)
            self.blocks.append((attention, ffn))
            shift = middle + _bias(block.ffn.fc2)
        self.norm = _norm(stage.norm, shift)

    def __call__(self, x: Tensor) -> Tensor:
        """Turn pixels or a map (B, H, W, C) into this stage's map (B, H', W', C')."""
        x_bhwc = self.embed(x)
        for attention, ffn in self.blocks:
            attention.add_to(x_bhwc)
            ffn.add_to(x_bhwc)
        return layer_norm(x_bhwc, self.norm)


class _Stem:
    """The patch embedding of pixels: what normalises them is folded into it."""

    def __init__(
        self, embed: PatchEmbedding, preprocessing: Preprocessing, dtype: torch.dtype
    ) -> None:
        proj = embed.proj
        if (proj.kernel_size, proj.in_channels) != ((TAPS, TAPS), CHANNELS):
            raise ValueError("the GPU's fast path starts with 7x7 patches of three channels")
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=proj.weight.device) * 255
            for values in (preprocessing.mean, preprocessing.std)
        )
        weight_cyxk = proj.weight.detach().double().permute(0, 2, 3, 1) / std
        if preprocessing.channel_order == "bgr":
            mean, weight_cyxk = mean.flip(0), weight_cyxk.flip(3)
        # Whole numbers below 256 are exact in bfloat16; what is left of the mean is the same at
        # each pixel, and what the convolution sees beyond the rim.
        offset = mean.round().clamp(0, 255)
        self.offset, self.rim = offset.float(), (mean - offset).float()
        shift = _bias(proj) - weight_cyxk.sum((1, 2)) @ (mean - offset)
        self.norm = _norm(embed.norm, shift)
        weight_tjc = weight_cyxk.flatten(2).permute(1, 2, 0)
        padding = (0, 0, 0, TAP_BYTES - TAPS * CHANNELS)
        self.weight_tjc = functional.pad(weight_tjc, padding).to(dtype).contiguous()

    def __call__(self, pixels_bhwc: Tensor) -> Tensor:
        return embed_pixels(pixels_bhwc, self.offset, self.rim, self.weight_tjc, self.norm)


class _Convolution:
    """A convolution by cuDNN, and a norm."""

    def __init__(self, conv: nn.Conv2d, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.weight = _channels_last(conv.weight, dtype)
        self.stride, self.padding = conv.stride, conv.padding
        self.norm = _norm(norm, _bias(conv))

    def __call__(self, map_bhwc: Tensor) -> Tensor:
        x_bchw = map_bhwc.permute(0, 3, 1, 2)
        patches = functional.conv2d(x_bchw, self.weight, None, self.stride, self.padding)
        return layer_norm(patches.permute(0, 2, 3, 1).contiguous(), self.norm)


class _NarrowAttention:
    """Attention to a reduced grid, of few channels, by a kernel that starts from the stream."""

    def __init__(self, attention: EfficientAttention, norm: Norm, dtype: torch.dtype) -> None:
        self.norm, self.num_heads = norm, attention.num_heads
        # Scores come out as powers of two.
        factor = math.log2(math.e) * (len(norm.scale) // self.num_heads) ** -0.5
        self.query_cc = (attention.q.weight.detach().double() * factor).to(dtype)
        self.query_bias_c = (_bias(attention.q) * factor).float()
        self.reduction = _NarrowReduction(attention, dtype)
        self.kv = _product(attention.kv, dtype)
        self.out_cc = attention.proj.weight.detach().to(dtype)

    def add_to(self, x_bhwc: Tensor) -> None:
        """Add to the stream, in place, what its tokens attend to."""
        reduced_bhwc = self.reduction(layer_norm(x_bhwc, self.norm))
        add_attention(
            x_bhwc,
            self.norm,
            self.query_cc,
            self.query_bias_c,
            functional.linear(reduced_bhwc, *self.kv).flatten(1, 2),
            self.out_cc,
            self.num_heads,
        )


class _WideAttention:
    """Attention by products of cuBLAS and torch's fused attention."""

    def __init__(self, attention: EfficientAttention, norm: Norm, dtype: torch.dtype) -> None:
        self.norm, self.num_heads = norm, attention.num_heads
        q, kv = _product(attention.q, dtype), _product(attention.kv, dtype)
        self.reduction = (
            None if attention.sr is None else _Convolution(*_reduction_of(attention), dtype)
        )
        joint = (torch.cat(parts) for parts in zip(q, kv, strict=True))
        self.products = [q, kv] if self.reduction is not None else [tuple(joint)]
        self.out_cc = _transposed(attention.proj.weight, dtype)

    def add_to(self, x_bhwc: Tensor) -> None:
        """Add to the stream, in place, what its tokens attend to."""
        channels = x_bhwc.shape[-1]
        normed_bhwc = layer_norm(x_bhwc, self.norm)
        if self.reduction is None:
            joint = functional.linear(normed_bhwc, *self.products[0])
            q, k, v = joint.flatten(1, 2).chunk(3, dim=-1)
        else:
            q = functional.linear(normed_bhwc, *self.products[0]).flatten(1, 2)
            joint = functional.linear(self.reduction(normed_bhwc), *self.products[1])
            k, v = joint.flatten(1, 2).chunk(2, dim=-1)
        out_band = functional.scaled_dot_product_attention(
            self._heads(q), self._heads(k), self._heads(v)
        )
        out_nc = out_band.transpose(1, 2).reshape(-1, channels)
        x_bhwc.view(-1, channels).addmm_(out_nc, self.out_cc)

    def _heads(self, x_bnc: Tensor) -> Tensor:
        b, n, _ = x_bnc.shape
        return x_bnc.view(b, n, self.num_heads, -1).transpose(1, 2)


class _NarrowReduction:
    """The grid that keys and values of a narrow stage come from."""

    def __init__(self, attention: EfficientAttention, dtype: torch.dtype) -> None:
        sr, norm = _reduction_of(attention)
        self.weight_vc = sr.weight.detach().permute(2, 3, 1, 0).flatten(0, 2).to(dtype).contiguous()
        self.stride, self.norm = sr.stride[0], _norm(norm, _bias(sr))

    def __call__(self, normed_bhwc: Tensor) -> Tensor:
        return reduce_patches(normed_bhwc, self.weight_vc, self.stride, self.norm)


def _reduction_of(attention: EfficientAttention) -> tuple[nn.Conv2d, nn.LayerNorm]:
    if attention.sr is None or attention.sr_norm is None:
        raise ValueError("attention over the whole grid has no reduction")
    return attention.sr, attention.sr_norm


class _MixFFN:
    """The feed-forward network with a depthwise convolution."""

    def __init__(self, ffn: MixFFN, norm: Norm, dtype: torch.dtype, *, is_narrow: bool) -> None:
        self.norm, self.is_narrow = norm, is_narrow
        weight = ffn.fc1.weight
        self.fc1 = _transposed(weight, dtype) if is_narrow else weight.detach().to(dtype)
        self.fc1_bias = _bias(ffn.fc1).to(torch.float32 if is_narrow else dtype)
        conv = dict(ffn.conv.named_parameters())
        self.conv_9f = conv["weight"].detach().float().flatten(1).T.contiguous()
        self.conv_bias_f = conv["bias"].detach().float().clone()
        self.fc2_fc = _transposed(ffn.fc2.weight, dtype)

    def add_to(self, x_bhwc: Tensor) -> None:
        """Add to the stream, in place, what the network makes of it."""
        if self.is_narrow:
            hidden = norm_linear(x_bhwc, self.norm, self.fc1, self.fc1_bias)
        else:
            hidden = functional.linear(layer_norm(x_bhwc, self.norm), self.fc1, self.fc1_bias)
        hidden = depthwise_gelu(hidden, self.conv_9f, self.conv_bias_f)
        channels = x_bhwc.shape[-1]
        x_bhwc.view(-1, channels).addmm_(hidden.view(-1, hidden.shape[-1]), self.fc2_fc)


def _norm(norm: nn.LayerNorm, shift: Tensor) -> Norm:
    scale, bias = (value.detach().float().clone() for value in (norm.weight, norm.bias))
    return Norm(shift.float(), scale, bias, norm.eps)


def _bias(layer: nn.Module) -> Tensor:
    return layer.get_parameter("bias").detach().double()


def _product(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return linear.weight.detach().to(dtype), _bias(linear).to(dtype)


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().T.to(dtype).contiguous()


def _channels_last(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
