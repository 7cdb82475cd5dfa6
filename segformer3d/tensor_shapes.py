"""Names and shapes of all tensors of a network, told without torch, which takes seconds to import.

The layers are those of SegFormer (Xie et al. 2021, arXiv 2105.15203) as `segformer3d.model` builds
them; a test holds the two against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from segformer3d.config import mit_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from segformer3d.config import MitSize, ModelConfig

Named = tuple[str, tuple[int, ...]]
_PATCHES = (7, 3, 3, 3)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a network's state dict, by name, in its order.

    Raises:
        ValueError: The encoder is timm's, whose layers only torch can tell.
    """
    if config.timm_name:
        raise ValueError(f"the layers of timm:{config.timm_name} are known to timm alone")
    size = mit_size(config.variant)
    heads = {"segmentation_head": config.num_classes, "depth_head": int(config.has_depth)}
    shapes = dict(_encoder(size))
    for name, out_channels in heads.items():
        if out_channels:
            shapes |= _head(name, size, config.head_width, out_channels)
    return shapes


def _encoder(size: MitSize) -> Iterator[Named]:
    in_channels = 3
    for stage, (dim, depth, ratio) in enumerate(
        zip(size.embed_dims, size.depths, size.sr_ratios, strict=True)
    ):
        name, patch = f"encoder.stages.{stage}", _PATCHES[stage]
        yield from _layer(f"{name}.patch_embed.proj", dim, in_channels, patch, patch)
        yield from _norm(f"{name}.patch_embed.norm", dim)
        for block in range(depth):
            yield from _block(f"{name}.blocks.{block}", dim, ratio, size.mlp_ratio * dim)
        yield from _norm(f"{name}.norm", dim)
        in_channels = dim


def _block(name: str, dim: int, ratio: int, hidden: int) -> Iterator[Named]:
    yield from _norm(f"{name}.norm1", dim)
    yield from _layer(f"{name}.attn.q", dim, dim)
    yield from _layer(f"{name}.attn.kv", 2 * dim, dim)
    yield from _layer(f"{name}.attn.proj", dim, dim)
    if ratio > 1:
        yield from _layer(f"{name}.attn.sr", dim, dim, ratio, ratio)
        yield from _norm(f"{name}.attn.sr_norm", dim)
    yield from _norm(f"{name}.norm2", dim)
    yield from _layer(f"{name}.ffn.fc1", hidden, dim)
    yield from _layer(f"{name}.ffn.conv", hidden, 1, 3, 3)
    yield from _layer(f"{name}.ffn.fc2", dim, hidden)


def _head(name: str, size: MitSize, width: int, out_channels: int) -> Iterator[Named]:
    for stage, dim in enumerate(size.embed_dims):
        yield from _layer(f"{name}.project.{stage}", width, dim, 1, 1)
    yield f"{name}.fuse.weight", (width, len(size.embed_dims) * width, 1, 1)
    yield from _norm(f"{name}.norm", width)
    yield f"{name}.norm.running_mean", (width,)
    yield f"{name}.norm.running_var", (width,)
    yield f"{name}.norm.num_batches_tracked", ()
    yield from _layer(f"{name}.predict", out_channels, width, 1, 1)


def _layer(name: str, *shape: int) -> Iterator[Named]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _norm(name: str, dim: int) -> Iterator[Named]:
    return _layer(name, dim)
