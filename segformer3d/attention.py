"""Where the encoder looks: attention maps per stage and head, taken from the running model.

Hooks on one attention module per stage keep what went into it; the maps are computed from that
with the module's own `queries_keys_values`, so there is no second copy of the model, and whoever
runs it (the `Predictor`) runs it as always. A map shows how one query's attention, or the mean
over all queries, is spread over the keys: it sums to 1. Keys lie on a grid of 1/32 of the frame's
sides in every stage of a Mix Transformer.

Shapes, also at the end of names: a attention heads, n queries, m keys, d channels of one head,
h and w a grid, c channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor

from segformer3d.encoder import MixTransformer

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.hooks import RemovableHandle

    from segformer3d.layers import EfficientAttention, Stage
    from segformer3d.model import Segformer3D

LAST_BLOCK = -1
CHUNK_FLOATS = 2**20  # attention weights held at a time: 4 MiB


@dataclass(frozen=True)
class StageAttention:
    """The attention of one block of a stage.

    Attributes:
        stage: Number of the stage, from 1.
        block: Number of the block within the stage, from 1.
        maps: float32 (heads, h, w), each map's sum is 1; the grid covers the whole frame.
    """

    stage: int
    block: int
    maps: NDArray[np.float32]


class AttentionProbe:
    """Watches one block per stage of a Mix Transformer; a context manager.

    Between entering and leaving, run the model on one frame, then ask. Leaving takes the hooks
    away.

    Attributes:
        num_heads: Heads of each stage, shallowest first.
    """

    def __init__(self, model: Segformer3D, *, block: int = LAST_BLOCK) -> None:
        """Choose what to watch; nothing is hooked yet.

        Args:
            model: The network; a `Predictor` may have taken it over.
            block: The block of each stage, from 1, or from the end: -1 is the last.

        Raises:
            ValueError: The encoder is no Mix Transformer, or a stage has no such block.
        """
        encoder = model.encoder
        if not isinstance(encoder, MixTransformer):
            raise ValueError(
                f"{model.config.variant} has no attention of this kind: use weights of a Mix "
                "Transformer (mit_...)"
            )
        self._watched = [
            _Watched(stage, cast("Stage", module), block)
            for stage, module in enumerate(encoder.stages, start=1)
        ]
        self.num_heads = tuple(item.attention.num_heads for item in self._watched)

    def __enter__(self) -> Self:
        for item in self._watched:
            item.hook()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for item in self._watched:
            item.unhook()

    @torch.inference_mode()
    def at(self, x: float, y: float) -> list[StageAttention]:
        """Return where the token under one point looked, per stage.

        Args:
            x: Place of the point as a share of the frame's width, 0 (left) to 1.
            y: Likewise of its height, 0 (top) to 1.

        Raises:
            ValueError: The point lies outside the frame.
            RuntimeError: The model has not run, or on several frames at once.
        """
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError(f"the point ({x}, {y}) lies outside the frame, which is 0 to 1")
        return [item.result(item.at(x, y)) for item in self._watched]

    @torch.inference_mode()
    def mean(self) -> list[StageAttention]:
        """Return where all tokens looked on average, per stage.

        Raises:
            RuntimeError: The model has not run, or on several frames at once.
        """
        return [item.result(item.mean()) for item in self._watched]


class _Watched:
    """The attention module of one block, and what last went into it."""

    def __init__(self, stage: int, module: Stage, block: int) -> None:
        depth = len(module.blocks)
        if block == 0 or not -depth <= block <= depth:
            raise ValueError(
                f"stage {stage} has no block {block}: it has 1 to {depth}, or -1 to -{depth} from "
                "its end"
            )
        self.stage = stage
        self.block = block if block > 0 else depth + 1 + block
        self.attention = cast("EfficientAttention", module.blocks[self.block - 1].attn)
        self._handle: RemovableHandle | None = None
        self._input_hwc: Tensor | None = None

    def hook(self) -> None:
        self._handle = self.attention.register_forward_pre_hook(self._keep)

    def unhook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._input_hwc = None

    def at(self, x: float, y: float) -> Tensor:
        """Attention (A, M) of the query token under a point."""
        q_and, k_amd = self._queries_keys()
        height, width = self._input().shape[:2]
        row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
        token = row * width + column
        return _attention(q_and[:, token : token + 1], k_amd)[:, 0]

    def mean(self) -> Tensor:
        """Attention (A, M), averaged over queries a chunk at a time."""
        q_and, k_amd = self._queries_keys()
        chunk = max(1, CHUNK_FLOATS // (k_amd.shape[0] * k_amd.shape[1]))
        total_am = torch.zeros_like(k_amd[..., 0])
        for q_chunk in torch.split(q_and, chunk, dim=1):
            total_am += _attention(q_chunk, k_amd).sum(1)
        return total_am / q_and.shape[1]

    def result(self, weights_am: Tensor) -> StageAttention:
        """Lay attention (A, M) out on the grid of the keys."""
        height, width = self._input().shape[:2]
        reduction = self.attention.sr.stride[0] if self.attention.sr is not None else 1
        maps = weights_am.view(-1, height // reduction, width // reduction)
        return StageAttention(stage=self.stage, block=self.block, maps=maps.cpu().numpy())

    def _keep(self, _module: object, inputs: tuple[Tensor, ...]) -> None:
        (x_bhwc,) = inputs
        if len(x_bhwc) != 1:
            raise RuntimeError(f"attention is watched one frame at a time, not {len(x_bhwc)}")
        self._input_hwc = x_bhwc[0]

    def _input(self) -> Tensor:
        if self._input_hwc is None:
            raise RuntimeError("run the model on a frame first")
        return self._input_hwc

    def _queries_keys(self) -> tuple[Tensor, Tensor]:
        q_band, k_bamd, _ = self.attention.queries_keys_values(self._input()[None].float())
        return q_band[0], k_bamd[0]


def _attention(q_and: Tensor, k_amd: Tensor) -> Tensor:
    return (q_and @ k_amd.transpose(-2, -1) / math.sqrt(q_and.shape[-1])).softmax(-1)
