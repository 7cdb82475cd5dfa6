"""The building blocks of the Mix Transformer (SegFormer, Xie et al. 2021, arXiv 2105.15203).

Tokens keep their grid: every block takes and gives (B, H, W, C), which a convolution sees as a
channels-last picture without a copy.

Shapes, also at the end of names: b batch, h and w the stage's grid, c channels, n = h * w
queries, m keys after reduction, a attention heads, d channels of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from segformer3d.collective import all_sum, rows_of_this_rank, world_size


def init_weights(module: nn.Module) -> None:
    """Initialise one module as the SegFormer authors do; for `nn.Module.apply`.

    What waits on the meta device for its parameters is left alone: drawing numbers there imports
    all of dynamo, which costs seconds.
    """
    if any(value.is_meta for value in module.parameters(recurse=False)):
        return
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DropPath(nn.Module):
    """Drop a residual branch per sample while training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Keep or drop each sample of (B, ...)."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        draws = rows_of_this_rank(x.shape[0]).view(-1, *(1,) * (x.ndim - 1)).to(x)
        return x * ((draws < keep) / keep).to(x)


class ChannelDropout(nn.Module):
    """Drop whole channels per sample while training, as the SegFormer authors' heads do.

    Unlike `nn.Dropout2d` it draws for the whole batch of all ranks, so that the number of ranks
    does not change what is dropped; and a draw per channel costs nothing, one per value much.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Drop channels of (B, C, H, W) and scale up what is kept."""
        if self.rate == 0.0 or not self.training:
            return x_bchw
        keep = 1.0 - self.rate
        draws_bc = rows_of_this_rank(x_bchw.shape[0], x_bchw.shape[1]).to(x_bchw)
        return x_bchw * ((draws_bc < keep) / keep).to(x_bchw)[:, :, None, None]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batch of all ranks while training, on any device."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Normalise (B, C, H, W) per channel."""
        if not self.training or world_size() == 1:
            return super().forward(x_bchw)
        x = x_bchw.float()
        count = x.numel() // x.shape[1] * world_size()
        mean = all_sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = all_sum(centred.square().sum((0, 2, 3))) / count
        self._track(mean, variance * count / (count - 1))
        scale = self.weight / torch.sqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x_bchw)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            raise ValueError("batch norm over ranks keeps running statistics with a momentum")
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


class PatchEmbedding(nn.Module):
    """Overlapping patches: a strided convolution, then a layer norm."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(out_channels, eps=norm_eps)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Turn a picture (B, C, H, W) into tokens (B, H / stride, W / stride, C')."""
        tokens_bhwc: Tensor = self.norm(self.proj(x_bchw).permute(0, 2, 3, 1))
        return tokens_bhwc


class EfficientAttention(nn.Module):
    """Self-attention whose keys and values come from a grid reduced `sr_ratio` times per side."""

    def __init__(self, dim: int, *, num_heads: int, sr_ratio: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr: nn.Conv2d | None = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.sr_norm: nn.LayerNorm | None = nn.LayerNorm(dim, eps=norm_eps)
        else:
            self.sr = None
            self.sr_norm = None

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """Attend from every token to the reduced grid; (B, H, W, C) in and out."""
        q_band, k_bamd, v_bamd = self.queries_keys_values(x_bhwc)
        out_band = functional.scaled_dot_product_attention(q_band, k_bamd, v_bamd)
        out_bhwc: Tensor = self.proj(out_band.transpose(1, 2).reshape(x_bhwc.shape))
        return out_bhwc

    def queries_keys_values(self, x_bhwc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, A, N, D), keys and values (B, A, M, D)."""
        q_bnd = self.q(x_bhwc).flatten(1, 2)
        k_bmd, v_bmd = self.kv(self._reduce(x_bhwc)).flatten(1, 2).chunk(2, dim=-1)
        return self._split_heads(q_bnd), self._split_heads(k_bmd), self._split_heads(v_bmd)

    def _reduce(self, x_bhwc: Tensor) -> Tensor:
        if self.sr is None or self.sr_norm is None:
            return x_bhwc
        reduced_bhwc: Tensor = self.sr_norm(self.sr(x_bhwc.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return reduced_bhwc

    def _split_heads(self, x_bnc: Tensor) -> Tensor:
        b, n, _ = x_bnc.shape
        return x_bnc.view(b, n, self.num_heads, -1).transpose(1, 2)


class MixFFN(nn.Module):
    """Feed-forward network with a depthwise 3x3 convolution, which also tells tokens where."""

    def __init__(self, dim: int, *, mlp_ratio: int) -> None:
        super().__init__()
        hidden = dim * mlp_ratio
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """Transform tokens; (B, H, W, C) in and out."""
        hidden_bchw = self.conv(self.fc1(x_bhwc).permute(0, 3, 1, 2))
        out_bhwc: Tensor = self.fc2(functional.gelu(hidden_bchw).permute(0, 2, 3, 1))
        return out_bhwc


class Block(nn.Module):
    """One Mix Transformer block: attention and Mix-FFN, each normed before and added after."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: int,
        drop_path: float,
        norm_eps: float,
        reduction_norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = EfficientAttention(
            dim, num_heads=num_heads, sr_ratio=sr_ratio, norm_eps=reduction_norm_eps
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.ffn = MixFFN(dim, mlp_ratio=mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """Transform tokens; (B, H, W, C) in and out."""
        x_bhwc = x_bhwc + self.drop_path(self.attn(self.norm1(x_bhwc)))
        out_bhwc: Tensor = x_bhwc + self.drop_path(self.ffn(self.norm2(x_bhwc)))
        return out_bhwc


class Stage(nn.Module):
    """A patch embedding, blocks and a closing norm."""

    def __init__(
        self, patch_embed: PatchEmbedding, blocks: list[Block], norm: nn.LayerNorm
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Turn a map (B, C, H, W) into this stage's map (B, C', H', W'), channels last."""
        tokens_bhwc: Tensor = self.norm(self.blocks(self.patch_embed(x_bchw)))
        return tokens_bhwc.permute(0, 3, 1, 2)


def resize_bilinear(x_bchw: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to (height, width), the one bilinear rule of the whole model."""
    if tuple(x_bchw.shape[-2:]) == tuple(size):
        return x_bchw
    return functional.interpolate(
        x_bchw, size=torch.Size(size), mode="bilinear", align_corners=False
    )
