"""The network on a GPU: bfloat16 throughout, with Triton kernels where torch would write much.

- `gpu_encoder` has the Mix Transformer.
- The folded heads from the finest map on are one kernel, whose hidden channels stay on the chip.
- Class ids are resolved from the logits without a resized plane.

Nothing here waits for the device, so that a CUDA graph can hold it.

Shapes, also at the end of names: b batch, h and w a grid's sides, c channels, n hidden channels
of all heads together, k classes, o outputs of all heads together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from segformer3d.encoder import MixTransformer
from segformer3d.gpu_encoder import GpuEncoder
from segformer3d.gpu_kernels import OUTPUTS_PADDED, fused_heads, resolve_largest
from segformer3d.network import Outputs

if TYPE_CHECKING:
    from segformer3d.config import Preprocessing
    from segformer3d.heads import FoldedHeads
    from segformer3d.model import Segformer3D

DTYPE = torch.bfloat16


class GpuNetwork:
    """A trained network, ready to run on a GPU; keeps no link to where it came from."""

    def __init__(
        self, model: Segformer3D, heads: FoldedHeads, preprocessing: Preprocessing
    ) -> None:
        """Copy a model with a Mix Transformer, on its device, and its heads folded.

        Raises:
            ValueError: Another encoder, or more outputs than the kernel holds.
        """
        if not isinstance(model.encoder, MixTransformer):
            raise ValueError("the GPU's fast path is for Mix Transformers")
        self._encode = GpuEncoder(model.encoder, preprocessing, DTYPE)
        self._heads = _FusedHeads(heads)
        self._num_classes = model.config.num_classes or 0
        self._has_depth = model.depth_head is not None

    def __call__(self, pixels_bhwc: Tensor, size: tuple[int, int]) -> Outputs:
        """Run on uint8 RGB (B, H, W, 3); class ids at `size`, a height and a width."""
        maps_bhwc = self._encode(pixels_bhwc)
        outs_bohw, confidence_b, entropy_b, num_bad_b = self._heads(maps_bhwc, self._num_classes)
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
        self.predict_on = torch.zeros(OUTPUTS_PADDED, sum(heads.widths), device=device)
        self.predict_bias_o = torch.zeros(OUTPUTS_PADDED, device=device)
        row = column = 0
        for (weight_no, bias_o), width, count in zip(
            heads.products, heads.widths, num_outputs, strict=True
        ):
            self.predict_on[column : column + count, row : row + width] = weight_no.detach().T
            self.predict_bias_o[column : column + count] = bias_o.detach()
            row, column = row + width, column + count
        # Products are summed in float32, so that neighbouring logits do not tie.
        self.predict_on = self.predict_on.to(DTYPE)
        finest, *others = (weight.detach().to(DTYPE) for weight in heads.weights)
        self.finest_cn = finest.T.contiguous()
        self.others_nc = others
        self.bias_n = heads.bias.detach().to(DTYPE)

    def __call__(
        self, maps_bhwc: list[Tensor], num_classes: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        finest_bhwc, *others_bhwc = maps_bhwc
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
            self.predict_on,
            self.predict_bias_o,
            outputs=self.outputs,
            classes=num_classes,
        )
