"""The all-MLP heads of SegFormer (Xie et al. 2021, arXiv 2105.15203) and their folded form.

A head projects each of the four maps to `head_width` channels, resizes them to the finest map,
fuses and predicts, all with 1x1 convolutions. Up to its ReLU that is linear, and a 1x1
convolution commutes with bilinear resizing; so for inference `fuse @ project`, batch norm
included, is one small matrix per stage at the stage's own resolution, and all heads share a pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from segformer3d.layers import BatchNorm, ChannelDropout, init_weights, resize_bilinear

if TYPE_CHECKING:
    from collections.abc import Sequence

DROPOUT = 0.1
BAND_FLOATS = 2**19  # what is in flight on a CPU: 2 MiB, about a core's cache


class AllMLPHead(nn.Module):
    """One head over four maps.

    Its fused convolution takes the stages from the deepest to the shallowest, as the paper's.
    """

    def __init__(
        self, embed_dims: Sequence[int], head_width: int, out_channels: int, *, norm_eps: float
    ) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(dim, head_width, 1) for dim in embed_dims)
        self.fuse = nn.Conv2d(len(embed_dims) * head_width, head_width, 1, bias=False)
        self.norm = BatchNorm(head_width, eps=norm_eps)
        self.dropout = ChannelDropout(DROPOUT)
        self.predict = nn.Conv2d(head_width, out_channels, 1)
        self.apply(init_weights)
        if not self.predict.weight.is_meta:
            nn.init.normal_(self.predict.weight, std=0.01)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn four maps (B, embed_dims[s], h_s, w_s) into (B, out_channels, h_0, w_0)."""
        fused = self._fuse_folded(maps) if self.training else self._fuse(maps)
        out: Tensor = self.predict(self.dropout(functional.relu(self.norm(fused))))
        return out

    def _fuse(self, maps: Sequence[Tensor]) -> Tensor:
        size = (maps[0].shape[-2], maps[0].shape[-1])
        projected = [
            resize_bilinear(project(map_), size)
            for project, map_ in zip(self.project, maps, strict=True)
        ]
        fused: Tensor = self.fuse(torch.cat(projected[::-1], dim=1))
        return fused

    def _fuse_folded(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute `_fuse` with one small matrix per stage, each step anew: half a step's time."""
        size = (maps[0].shape[-2], maps[0].shape[-1])
        blocks = self.fuse.weight.flatten(1).chunk(len(maps), dim=1)[::-1]
        total: Tensor | None = None
        for project, block, map_ in zip(self.project, blocks, maps, strict=True):
            weight = (block @ project.get_parameter("weight").flatten(1))[:, :, None, None]
            bias = block @ project.get_parameter("bias")
            part = resize_bilinear(functional.conv2d(map_, weight, bias), size)
            total = part if total is None else total + part
        if total is None:
            raise ValueError("a head needs at least one map")
        return total


class SegmentationHead(AllMLPHead):
    """Logits of each class at the finest map's size."""


class DepthHead(AllMLPHead):
    """One channel of depth at the finest map's size."""

    def __init__(self, embed_dims: Sequence[int], head_width: int, *, norm_eps: float) -> None:
        super().__init__(embed_dims, head_width, 1, norm_eps=norm_eps)


class FoldedHeads(nn.Module):
    """Several trained heads as one, for inference: the same function, a fraction of the work.

    Keeps nothing of the heads it is made from; changing them later changes nothing here.
    """

    def __init__(self, heads: Sequence[AllMLPHead]) -> None:
        super().__init__()
        with torch.no_grad():
            folded = [_fold(head) for head in heads]
        stages = zip(*(weights for weights, _ in folded), strict=True)
        self.weights = nn.ParameterList(_copy(torch.cat(weights)) for weights in stages)
        self.bias = _copy(torch.cat([bias for _, bias in folded]))
        self.predicts = nn.ModuleList(_linear(head.predict) for head in heads)
        self.widths = [head.predict.in_channels for head in heads]
        self.requires_grad_(requires_grad=False)
        # Laid out for products without a bias, which a CPU takes twice as fast.
        self.finest = self.weights[0].T.contiguous()
        self.products = [
            (predict.get_parameter("weight").T.contiguous(), predict.get_parameter("bias"))
            for predict in self.predicts
        ]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Turn four maps (B, embed_dims[s], h_s, w_s) into float32 (B, out, h_0, w_0) per head."""
        finest_bhwc, *others_bhwc = (map_.permute(0, 2, 3, 1) for map_ in maps)
        lows_bhwc = [
            functional.linear(map_, weight)
            for map_, weight in zip(others_bhwc, self.weights[1:], strict=True)
        ]
        if _is_plain(finest_bhwc) and all(_is_plain(low) for low in lows_bhwc):
            samples = zip(finest_bhwc, *lows_bhwc, strict=True)
            outs_hwc = [self._forward_compiled(finest, lows) for finest, *lows in samples]
            outs_bhwc = [_stacked(outs) for outs in zip(*outs_hwc, strict=True)]
        else:
            outs_bhwc = self._forward_torch(finest_bhwc, lows_bhwc)
        return [out.permute(0, 3, 1, 2) for out in outs_bhwc]

    def _forward_compiled(self, finest_hwc: Tensor, lows_hwc: Sequence[Tensor]) -> list[Tensor]:
        """Predict one sample on a CPU, so many rows at a time that they stay in the cache."""
        # Numba takes half a second to import, and processes that run no model need none.
        from segformer3d.native import add_resized_relu

        height, width, channels = finest_hwc.shape
        # A resize's shares add up to 1, so the bias can go to the smallest map, and costs nothing.
        first, second, third = (low.numpy() for low in (*lows_hwc[:-1], lows_hwc[-1] + self.bias))
        outs = [torch.empty(height * width, len(bias)) for _, bias in self.products]
        rows = min(height, max(1, BAND_FLOATS // (width * sum(self.widths))))
        hidden_tc = torch.empty(rows * width, sum(self.widths))
        for top in range(0, height, rows):
            own = slice(top * width, min(top + rows, height) * width)
            band_tc = hidden_tc[: own.stop - own.start]
            torch.mm(finest_hwc.reshape(-1, channels)[own], self.finest, out=band_tc)
            add_resized_relu(
                band_tc.view(-1, width, band_tc.shape[1]).numpy(),
                (first, second, third),
                top,
                height,
            )
            parts = torch.split(band_tc, self.widths, dim=1)
            for part, out, (weight, _) in zip(parts, outs, self.products, strict=True):
                torch.mm(part, weight, out=out[own])
        return [
            out.add_(bias).view(height, width, -1)
            for out, (_, bias) in zip(outs, self.products, strict=True)
        ]

    def _forward_torch(self, finest_bhwc: Tensor, lows_bhwc: Sequence[Tensor]) -> list[Tensor]:
        size = (finest_bhwc.shape[1], finest_bhwc.shape[2])
        hidden_bchw = functional.linear(finest_bhwc, self.weights[0], self.bias).permute(0, 3, 1, 2)
        for low in lows_bhwc:
            hidden_bchw = hidden_bchw + resize_bilinear(low.permute(0, 3, 1, 2), size)
        return self._predict(functional.relu(hidden_bchw).permute(0, 2, 3, 1))

    def _predict(self, hidden: Tensor) -> list[Tensor]:
        """Turn (..., all widths) into float32 (..., out) per head."""
        # In bfloat16 neighbouring logits would tie: the last product is always in float32.
        with torch.autocast(hidden.device.type, enabled=False):
            parts = torch.split(hidden.float(), self.widths, dim=-1)
            return [predict(part) for predict, part in zip(self.predicts, parts, strict=True)]


def _stacked(outs: Sequence[Tensor]) -> Tensor:
    return outs[0][None] if len(outs) == 1 else torch.stack(tuple(outs))


def _is_plain(x: Tensor) -> bool:
    """Whether compiled code may read it as an array."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad


def _fold(head: AllMLPHead) -> tuple[list[Tensor], Tensor]:
    """Fold one head in float64: a matrix (head_width, embed_dim) per stage, and one bias."""
    norm = head.norm
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a head without running statistics cannot be folded")
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = norm.bias.double() - scale * norm.running_mean.double()
    fuse = scale[:, None] * head.fuse.weight.double().flatten(1)
    blocks = fuse.chunk(len(head.project), dim=1)[::-1]
    projections = [dict(project.named_parameters()) for project in head.project]
    pairs = list(zip(blocks, projections, strict=True))
    weights = [block @ project["weight"].double().flatten(1) for block, project in pairs]
    bias += sum(block @ project["bias"].double() for block, project in pairs)
    return weights, bias


def _copy(matrix: Tensor) -> nn.Parameter:
    return nn.Parameter(matrix.detach().float().clone())


def _linear(conv: nn.Conv2d) -> nn.Linear:
    linear = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
    state = {
        name: _copy(value.flatten(1) if value.ndim > 1 else value)
        for name, value in conv.named_parameters()
    }
    linear.load_state_dict(state, assign=True)
    return linear
