"""Segformer3D: one encoder, a segmentation head and a depth head.

The encoder and the heads are those of SegFormer (Xie et al. 2021, arXiv 2105.15203); the depth
head is a second head of the same form with one output channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from segformer3d.encoder import build_encoder
from segformer3d.heads import DepthHead, SegmentationHead
from segformer3d.layers import resize_bilinear

if TYPE_CHECKING:
    from segformer3d.config import ModelConfig


@dataclass(frozen=True)
class DenseOutputs:
    """What the network gives; a head it lacks gives None.

    Attributes:
        logits: (B, num_classes, H / 4, W / 4).
        depth: (B, 1, H / 4, W / 4), in the units of the weights' depth codec.
    """

    logits: Tensor | None
    depth: Tensor | None

    def resized(self, size: tuple[int, int]) -> DenseOutputs:
        """Resize both to (height, width), bilinearly and without aligned corners."""
        return DenseOutputs(
            logits=None if self.logits is None else resize_bilinear(self.logits, size),
            depth=None if self.depth is None else resize_bilinear(self.depth, size),
        )


class Segformer3D(nn.Module):
    """The multi-task network; sides of its input are multiples of 32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        dims, width, eps = self.encoder.embed_dims, config.head_width, config.head_norm_eps
        self.segmentation_head = (
            SegmentationHead(dims, width, config.num_classes, norm_eps=eps)
            if config.num_classes is not None
            else None
        )
        self.depth_head = DepthHead(dims, width, norm_eps=eps) if config.has_depth else None

    def forward_features(self, x_bchw: Tensor) -> list[Tensor]:
        """Encode a normalised picture (B, 3, H, W) into maps at 1/4, 1/8, 1/16 and 1/32."""
        maps: list[Tensor] = self.encoder(x_bchw)
        return maps

    def forward(self, x_bchw: Tensor) -> DenseOutputs:
        """Predict from a normalised picture (B, 3, H, W), at a quarter of its sides."""
        return self.forward_heads(self.forward_features(x_bchw))

    def forward_heads(self, maps: list[Tensor]) -> DenseOutputs:
        """Predict from the four maps that `forward_features` gives."""
        return DenseOutputs(
            logits=None if self.segmentation_head is None else self.segmentation_head(maps),
            depth=self._depth(maps),
        )

    def _depth(self, maps: list[Tensor]) -> Tensor | None:
        if self.depth_head is None:
            return None
        return activate_depth(self.depth_head(maps), self.config)


def activate_depth(raw: Tensor, config: ModelConfig) -> Tensor:
    """Turn the depth head's output, of any shape, into depth in the units of the codec."""
    return raw.float().exp() if config.depth_activation == "exp" else raw


def build_model(config: ModelConfig) -> Segformer3D:
    """Build the network that `config` describes, randomly initialised, in training mode.

    Raises:
        ValueError: Its timm encoder is unknown or lacks the four maps.
    """
    return Segformer3D(config)
