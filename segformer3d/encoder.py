"""Encoders: a picture in, four feature maps at 1/4, 1/8, 1/16 and 1/32 of its sides out.

`MixTransformer` is MiT-B0 to B5 (SegFormer, Xie et al. 2021, arXiv 2105.15203); `TimmEncoder`
puts any timm encoder with such maps behind the same interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from segformer3d.config import mit_size
from segformer3d.layers import Block, PatchEmbedding, Stage, init_weights

if TYPE_CHECKING:
    from segformer3d.config import MitSize, ModelConfig

REDUCTIONS = (4, 8, 16, 32)
DROP_PATH_MAX = 0.1


class MixTransformer(nn.Module):
    """The hierarchical encoder of SegFormer.

    Attributes:
        embed_dims: Channels of the four maps, shallowest first.
    """

    def __init__(self, size: MitSize, *, patch_norm_eps: float, block_norm_eps: float) -> None:
        super().__init__()
        self.embed_dims = size.embed_dims
        self.stages = nn.ModuleList(
            _stage(size, index, patch_norm_eps=patch_norm_eps, block_norm_eps=block_norm_eps)
            for index in range(len(size.embed_dims))
        )
        self.apply(init_weights)

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        """Encode (B, 3, H, W); map s is (B, embed_dims[s], H / 4 / 2**s, W / 4 / 2**s)."""
        maps: list[Tensor] = []
        for stage in self.stages:
            x_bchw = stage(x_bchw)
            maps.append(x_bchw)
        return maps


def _stage(size: MitSize, index: int, *, patch_norm_eps: float, block_norm_eps: float) -> Stage:
    dim = size.embed_dims[index]
    first = sum(size.depths[:index])
    drop_path_step = DROP_PATH_MAX / max(sum(size.depths) - 1, 1)
    patch_embed = PatchEmbedding(
        size.embed_dims[index - 1] if index else 3,
        dim,
        kernel=3 if index else 7,
        stride=2 if index else 4,
        norm_eps=patch_norm_eps,
    )
    blocks = [
        Block(
            dim,
            num_heads=size.num_heads[index],
            sr_ratio=size.sr_ratios[index],
            mlp_ratio=size.mlp_ratio,
            drop_path=drop_path_step * block,
            norm_eps=block_norm_eps,
            reduction_norm_eps=patch_norm_eps,
        )
        for block in range(first, first + size.depths[index])
    ]
    return Stage(patch_embed, blocks, nn.LayerNorm(dim, eps=block_norm_eps))


class TimmEncoder(nn.Module):
    """A timm encoder with `features_only`, randomly initialised.

    Attributes:
        embed_dims: Channels of the four maps, shallowest first.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        # Importing timm takes 18 s on two cores; only this encoder needs it.
        import timm

        try:
            self.model = timm.create_model(name, features_only=True, pretrained=False)
        except (RuntimeError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"timm cannot build {name!r} with features_only: {reason}") from error
        info = self.model.feature_info
        reductions = list(info.reduction())
        if not set(REDUCTIONS) <= set(reductions):
            raise ValueError(
                f"timm encoder {name!r} gives maps at reductions {reductions}; "
                f"one with maps at {list(REDUCTIONS)} is needed"
            )
        self.picks = [reductions.index(reduction) for reduction in REDUCTIONS]
        self.embed_dims = tuple(int(info.channels()[pick]) for pick in self.picks)
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        """Encode (B, 3, H, W); map s is (B, embed_dims[s], H / 4 / 2**s, W / 4 / 2**s)."""
        every = self.model(x_bchw)
        maps: list[Tensor] = [every[pick] for pick in self.picks]
        return [map_.permute(0, 3, 1, 2) for map_ in maps] if self.channels_last else maps


def build_encoder(config: ModelConfig) -> MixTransformer | TimmEncoder:
    """Build the encoder that `config.variant` names, randomly initialised.

    Raises:
        ValueError: timm does not know the encoder or it lacks the four maps.
    """
    if config.timm_name:
        return TimmEncoder(config.timm_name)
    return MixTransformer(
        mit_size(config.variant),
        patch_norm_eps=config.patch_norm_eps,
        block_norm_eps=config.block_norm_eps,
    )
