"""The origin project's network, made anew from `shared/origin.md` and run the plain eager way.

What others are measured against: attention with an explicit softmax, tokens and maps turned into
each other, every head by itself and unfolded, float32, both outputs resized to full size, then
the argmax. Names of parameters are the origin's, so its own state dicts load.

Shapes, also at the end of names: b batch, h and w a map's sides, n = h * w tokens, m keys after
reduction, c channels, a attention heads, d channels of one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from segformer3d.config import mit_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from segformer3d.config import MitSize, ModelConfig, Preprocessing
    from segformer3d.model import Segformer3D

DROPOUT = 0.1

_TO_ORIGIN = (
    (r"^encoder\.", "backbone."),
    (r"\.attn\.sr_norm\.", ".attn.norm."),
    (r"^segmentation_head\.", "decoder_head."),
    # Its head layers start at the deepest stage.
    *((rf"_head\.project\.{stage}\.", f"_head.layers.{3 - stage}.") for stage in range(4)),
    (r"_head\.fuse\.", "_head.linear_fuse."),
    (r"_head\.norm\.", "_head.bn."),
    (r"_head\.predict\.", "_head.linear_pred."),
)


class PatchEmbed(nn.Module):
    """A strided convolution with overlapping windows, then a layer norm over tokens."""

    def __init__(
        self, in_channels: int, dim: int, *, kernel: int, stride: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x_bchw: Tensor) -> tuple[Tensor, int, int]:
        """Turn a map (B, C, H, W) into tokens (B, N, C') and the sides of their grid."""
        x_bchw = self.proj(x_bchw)
        height, width = x_bchw.shape[2:]
        return self.norm(to_tokens(x_bchw)), height, width


class Attention(nn.Module):
    """Self-attention to a reduced grid, its matrix of weights written out."""

    def __init__(self, dim: int, *, num_heads: int, sr_ratio: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x_bnc: Tensor, height: int, width: int) -> Tensor:
        """Attend from every token of a height x width grid; (B, N, C) in and out."""
        b, n, c = x_bnc.shape
        heads = self.num_heads
        q_band = self.q(x_bnc).reshape(b, n, heads, c // heads).permute(0, 2, 1, 3)
        reduced_bmc = self._reduce(x_bnc, height, width)
        # Keys first, then values, heads inside.
        kv = self.kv(reduced_bmc).reshape(b, -1, 2, heads, c // heads).permute(2, 0, 3, 1, 4)
        k_bamd, v_bamd = kv[0], kv[1]
        weights_banm = (q_band @ k_bamd.transpose(-2, -1) * self.scale).softmax(dim=-1)
        out_bnc = (weights_banm @ v_bamd).transpose(1, 2).reshape(b, n, c)
        attended: Tensor = self.proj(out_bnc)
        return attended

    def _reduce(self, x_bnc: Tensor, height: int, width: int) -> Tensor:
        if self.sr_ratio == 1:
            return x_bnc
        reduced: Tensor = self.norm(to_tokens(self.sr(to_map(x_bnc, height, width))))
        return reduced


class MixFeedForward(nn.Module):
    """Two linear layers with a depthwise 3x3 convolution and GELU between them."""

    def __init__(self, dim: int, *, mlp_ratio: int) -> None:
        super().__init__()
        hidden = mlp_ratio * dim
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_bnc: Tensor, height: int, width: int) -> Tensor:
        """Transform the tokens of a height x width grid; (B, N, C) in and out."""
        hidden_bnc = to_tokens(self.conv(to_map(self.fc1(x_bnc), height, width)))
        out: Tensor = self.fc2(functional.gelu(hidden_bnc))
        return out


class Block(nn.Module):
    """Attention, then the feed-forward part; drop path does nothing here and is left out."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: int,
        norm_eps: float,
        reduction_norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(
            dim, num_heads=num_heads, sr_ratio=sr_ratio, norm_eps=reduction_norm_eps
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.ffn = MixFeedForward(dim, mlp_ratio=mlp_ratio)

    def forward(self, x_bnc: Tensor, height: int, width: int) -> Tensor:
        """Transform the tokens of a height x width grid; (B, N, C) in and out."""
        x_bnc = x_bnc + self.attn(self.norm1(x_bnc), height, width)
        out: Tensor = x_bnc + self.ffn(self.norm2(x_bnc), height, width)
        return out


class EncoderStage(nn.Module):
    """One resolution of the encoder."""

    def __init__(self, size: MitSize, index: int, config: ModelConfig) -> None:
        super().__init__()
        dim = size.embed_dims[index]
        self.patch_embed = PatchEmbed(
            size.embed_dims[index - 1] if index else 3,
            dim,
            kernel=3 if index else 7,
            stride=2 if index else 4,
            norm_eps=config.patch_norm_eps,
        )
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads=size.num_heads[index],
                sr_ratio=size.sr_ratios[index],
                mlp_ratio=size.mlp_ratio,
                norm_eps=config.block_norm_eps,
                reduction_norm_eps=config.patch_norm_eps,
            )
            for _ in range(size.depths[index])
        )
        self.norm = nn.LayerNorm(dim, eps=config.block_norm_eps)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Turn a map (B, C, H, W) into this stage's map (B, C', H', W')."""
        x_bnc, height, width = self.patch_embed(x_bchw)
        for block in self.blocks:
            x_bnc = block(x_bnc, height, width)
        return to_map(self.norm(x_bnc), height, width)


class Encoder(nn.Module):
    """A Mix Transformer: four stages, each from the map before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = mit_size(config.variant)
        self.stages = nn.ModuleList(EncoderStage(size, index, config) for index in range(4))

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        """Encode (B, 3, H, W) into maps at 1/4, 1/8, 1/16 and 1/32, shallowest first."""
        maps = []
        for stage in self.stages:
            x_bchw = stage(x_bchw)
            maps.append(x_bchw)
        return maps


class Head(nn.Module):
    """An all-MLP head, step by step: project, resize, concatenate, fuse, norm, predict."""

    def __init__(
        self, embed_dims: Sequence[int], head_width: int, out_channels: int, *, norm_eps: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(dim, head_width, 1) for dim in reversed(embed_dims))
        self.linear_fuse = nn.Conv2d(len(embed_dims) * head_width, head_width, 1, bias=False)
        self.bn = nn.BatchNorm2d(head_width, eps=norm_eps)
        self.dropout = nn.Dropout(DROPOUT)
        self.linear_pred = nn.Conv2d(head_width, out_channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn four maps, shallowest first, into (B, out_channels, h_0, w_0)."""
        height, width = maps[0].shape[2:]
        projected = [
            resize(layer(map_), height, width)
            for layer, map_ in zip(self.layers, reversed(maps), strict=True)
        ]
        fused = functional.relu(self.bn(self.linear_fuse(torch.cat(projected, dim=1))))
        out: Tensor = self.linear_pred(self.dropout(fused))
        return out


class OriginNetwork(nn.Module):
    """The origin's network, in eval mode; its state dict has the origin's names.

    Args:
        config: Sizes and epsilons; it must have both heads and a Mix Transformer.

    Raises:
        ValueError: A head is missing, or the encoder is another.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.num_classes is None or not config.has_depth:
            raise ValueError("the origin's network has both heads: give a model that has them")
        dims, width = mit_size(config.variant).embed_dims, config.head_width
        self.backbone = Encoder(config)
        self.decoder_head = Head(dims, width, config.num_classes, norm_eps=config.head_norm_eps)
        self.depth_head = Head(dims, width, 1, norm_eps=config.head_norm_eps)
        self.eval()

    def quarter(self, x_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Predict logits (B, K, H / 4, W / 4) and depth (B, 1, H / 4, W / 4)."""
        maps = self.backbone(x_bchw)
        return self.decoder_head(maps), self.depth_head(maps)

    def forward(self, x_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Predict from a normalised picture: logits (B, K, H, W) and depth (B, 1, H, W)."""
        height, width = x_bchw.shape[2:]
        logits, depth = self.quarter(x_bchw)
        return resize(logits, height, width), resize(depth, height, width)


class OriginEager(nn.Module):
    """From frames to outputs: normalising, the network, full size, argmax, all in torch.

    Attributes:
        network: The network inside.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: OriginNetwork, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self._bgr = preprocessing.channel_order == "bgr"
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))
        self.eval()

    def forward(self, frames_bhwc: Tensor) -> tuple[Tensor, Tensor]:
        """Turn frames, uint8 (B, H, W, 3), into class ids and depth as `frame_to_outputs` does."""
        logits, depth = self.network(self.normalised(frames_bhwc))
        return logits.argmax(dim=1).to(torch.uint8), depth[:, 0]

    def normalised(self, frames_bhwc: Tensor) -> Tensor:
        """Turn frames, uint8 (B, H, W, 3), into the network's float32 (B, 3, H, W)."""
        pixels_bchw = frames_bhwc.permute(0, 3, 1, 2)
        if self._bgr:
            pixels_bchw = pixels_bchw.flip(1)
        return (pixels_bchw.float() / 255 - self.mean) / self.std

    @torch.inference_mode()
    def frame_to_outputs(
        self, frames_bhwc: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Annotate frames.

        Args:
            frames_bhwc: uint8 (B, H, W, 3), RGB; H and W are multiples of 32.

        Returns:
            Class ids, uint8 (B, H, W), and the depth head's own output, float32 (B, H, W).
        """
        class_ids, depth = self(torch.from_numpy(frames_bhwc))
        return class_ids.numpy(), depth.numpy()


def to_tokens(x_bchw: Tensor) -> Tensor:
    """Turn a map (B, C, H, W) into tokens (B, N, C)."""
    return x_bchw.flatten(2).transpose(1, 2)


def to_map(x_bnc: Tensor, height: int, width: int) -> Tensor:
    """Turn tokens (B, N, C) into a contiguous map (B, C, H, W)."""
    b, _, c = x_bnc.shape
    return x_bnc.transpose(1, 2).reshape(b, c, height, width)


def resize(x_bchw: Tensor, height: int, width: int) -> Tensor:
    """Resize a map bilinearly, without aligned corners."""
    return functional.interpolate(
        x_bchw, size=(height, width), mode="bilinear", align_corners=False
    )


def origin_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of `Segformer3D` as the origin does: the inverse of `remap_origin`."""
    renamed = {}
    for name, value in state.items():
        theirs = name
        for pattern, replacement in _TO_ORIGIN:
            theirs = re.sub(pattern, replacement, theirs)
        renamed[theirs] = value
    return renamed


def origin_network(model: Segformer3D) -> OriginNetwork:
    """Build the origin's network with a copy of the weights of one of our models.

    Raises:
        ValueError: The model lacks a head, or its encoder is no Mix Transformer.
    """
    network = OriginNetwork(model.config)
    network.load_state_dict(origin_state(model.state_dict()))
    return network
