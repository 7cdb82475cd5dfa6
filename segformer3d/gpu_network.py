"""The network on a GPU: bfloat16 throughout, with Triton kernels where torch would write much.

- The Mix Transformer is copied in bfloat16, its residual stream too. Between the two products of
  a Mix-FFN one kernel convolves and activates, so that its four times wider map is written twice
  and read twice instead of four times each.
- The folded heads from the finest map on are one kernel, whose hidden channels stay on the chip.
- Class ids are resolved from the logits without a resized plane.

Nothing here waits for the device, so that a CUDA graph can hold it.

Shapes, also at the end of names: b batch, h and w a grid's sides, c channels, n hidden channels
of all heads together, k classes, o outputs of all heads together.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from segformer3d.encoder import MixTransformer
from segformer3d.gpu_kernels import (
    OUTPUTS_PADDED,
    depthwise_gelu,
    fused_heads,
    resolve_largest,
)
from segformer3d.layers import MixFFN
from segformer3d.network import Outputs

if TYPE_CHECKING:
    from segformer3d.heads import FoldedHeads
    from segformer3d.model import Segformer3D

DTYPE = torch.bfloat16


class GpuNetwork:
    """A trained network, ready to run on a GPU; keeps no link to where it came from."""

    def __init__(self, model: Segformer3D, heads: FoldedHeads) -> None:
        """Copy a model with a Mix Transformer, on its device, and its heads folded.

        Raises:
            ValueError: Another encoder, or more outputs than the kernel holds.
        """
        if not isinstance(model.encoder, MixTransformer):
            raise ValueError("the GPU's fast path is for Mix Transformers")
        self._encode = _bfloat16_encoder(model.encoder)
        self._heads = _FusedHeads(heads)
        self._num_classes = model.config.num_classes or 0
        self._has_depth = model.depth_head is not None

    def __call__(self, x_bchw: Tensor, size: tuple[int, int]) -> Outputs:
        """Run on what `Input` gives; class ids at `size`, a height and a width."""
        maps = self._encode(x_bchw.to(DTYPE))
        outs_bohw, confidence_b, entropy_b, num_bad_b = self._heads(maps, self._num_classes)
        depth_bq = outs_bohw[:, -1] if self._has_depth else None
        if not self._num_classes:
            return Outputs(num_bad_b == 0, None, None, None, depth_bq)
        ids = resolve_largest(outs_bohw[:, : self._num_classes], size)
        return Outputs(num_bad_b == 0, ids, confidence_b, entropy_b, depth_bq)


class _FusedHeads:
    """The folded heads, laid out for their kernel."""

    def __init__(self, heads: FoldedHeads) -> None:
        num_outputs = [len(bias) for _, bias in heads.products]
        self.outputs = sum(num_outputs)
        if self.outputs > OUTPUTS_PADDED:
            raise ValueError(f"the GPU's fast path is for at most {OUTPUTS_PADDED} outputs")
        device = heads.bias.device
        self.predict_no = torch.zeros(sum(heads.widths), OUTPUTS_PADDED, device=device)
        self.predict_bias_o = torch.zeros(OUTPUTS_PADDED, device=device)
        row = column = 0
        for (weight_no, bias_o), width, count in zip(
            heads.products, heads.widths, num_outputs, strict=True
        ):
            self.predict_no[row : row + width, column : column + count] = weight_no.detach()
            self.predict_bias_o[column : column + count] = bias_o.detach()
            row, column = row + width, column + count
        finest, *others = (weight.detach().to(DTYPE) for weight in heads.weights)
        self.finest_cn = finest.T.contiguous()
        self.others_nc = others
        self.bias_n = heads.bias.detach().to(DTYPE)

    def __call__(
        self, maps: list[Tensor], num_classes: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        finest_bhwc, *others_bhwc = (map_.permute(0, 2, 3, 1).contiguous() for map_ in maps)
        # A resize's shares add up to 1, so the bias can go to the smallest map, and costs nothing.
        biases = [None] * (len(others_bhwc) - 1) + [self.bias_n]
        lows_bhwn = [
            functional.linear(map_, weight, bias)
            for map_, weight, bias in zip(others_bhwc, self.others_nc, biases, strict=True)
        ]
        return fused_heads(
            finest_bhwc,
            lows_bhwn,
            self.finest_cn,
            self.predict_no,
            self.predict_bias_o,
            outputs=self.outputs,
            classes=num_classes,
        )


class _FusedMixFFN(nn.Module):
    """A Mix-FFN whose convolution and activation are one kernel."""

    def __init__(self, ffn: MixFFN) -> None:
        super().__init__()
        self.fc1, self.fc2 = ffn.fc1, ffn.fc2
        conv = dict(ffn.conv.named_parameters())
        self.weight_9c = conv["weight"].detach().float().flatten(1).T.contiguous()
        self.bias_c = conv["bias"].detach().float().contiguous()

    def forward(self, x_bhwc: Tensor) -> Tensor:
        hidden_bhwc = depthwise_gelu(self.fc1(x_bhwc), self.weight_9c, self.bias_c)
        out_bhwc: Tensor = self.fc2(hidden_bhwc)
        return out_bhwc


def _bfloat16_encoder(encoder: MixTransformer) -> MixTransformer:
    copied = copy.deepcopy(encoder).requires_grad_(requires_grad=False).eval()
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(getattr(module, "ffn", None), MixFFN):
            # Before the convolution's weights lose bits, which its kernel takes in float32.
            module.ffn = _FusedMixFFN(cast("MixFFN", module.ffn))
        if isinstance(module, nn.Conv2d):
            # No stub of `Module.to` knows the keyword.
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied.to(DTYPE)
