"""The network as `Predictor` runs it: from pixels to class ids and what the depth head says.

Shapes, also at the end of names: b batch, h and w the frame's sides, k classes, and q the
grid of h / 4 by w / 4.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from segformer3d.class_ids import resolve_class_ids
from segformer3d.encoder import MixTransformer
from segformer3d.gpu_lanes import upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from segformer3d.config import Preprocessing
    from segformer3d.heads import FoldedHeads
    from segformer3d.model import Segformer3D


@dataclass(frozen=True)
class Outputs:
    """What the network says of B frames; a head that the weights lack gives None.

    Attributes:
        finite_b: bool (B,), whether all of a frame's outputs are finite; what else is said of a
            frame that is not means nothing.
        class_ids: uint8 (B, H, W), or at the size asked for.
        confidence_b: float32 (B,), mean over the grid of the largest class probability.
        entropy_b: float32 (B,), mean over the grid of the class entropy, in nats.
        depth_bq: float32 (B, H / 4, W / 4), as the depth head gives it.
    """

    finite_b: Tensor
    class_ids: Tensor | None
    confidence_b: Tensor | None
    entropy_b: Tensor | None
    depth_bq: Tensor | None


class Network:
    """Runs on any device: on a CPU by compiled code, elsewhere by torch, in bfloat16 on CUDA."""

    def __init__(self, model: Segformer3D, heads: FoldedHeads) -> None:
        """Take a model in eval mode, on its device, and its heads folded."""
        self.device = next(model.parameters()).device
        self._has_segmentation = model.segmentation_head is not None
        self._has_depth = model.depth_head is not None
        self._encode = _Encoder(model.encoder)
        self._heads = heads

    def __call__(self, x_bchw: Tensor, size: tuple[int, int]) -> Outputs:
        """Run on what `Input` gives; class ids at `size`, a height and a width."""
        with self._autocast():
            outs = self._heads(self._encode(x_bchw))
        finite_b = torch.stack([_are_finite(out) for out in outs]).all(0)
        class_ids = confidence_b = entropy_b = None
        if self._has_segmentation:
            # What is not finite has no largest class.
            logits = masked(outs[0], finite_b, 0)
            class_ids, confidence_b, entropy_b = resolve_class_ids(logits, size)
        depth_bq = outs[-1][:, 0] if self._has_depth else None
        return Outputs(finite_b, class_ids, confidence_b, entropy_b, depth_bq)

    def is_watched(self) -> bool:
        """Whether hooks on the model's modules are waiting for frames, one after the other."""
        return self._encode.watched() is not None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()


class Input:
    """Turns pixels into the numbers that the weights were trained on."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._device = device
        self._bgr = preprocessing.channel_order == "bgr"
        self._scale, self._bias = input_affine(preprocessing, device)

    def from_frames(self, frames: NDArray[np.uint8]) -> Tensor:
        """Normalise uint8 RGB (B, H, W, 3): float32 (B, 3, H, W) on the device, channels last."""
        if self._device.type == "cpu":
            return self._compiled(frames)
        return self.from_pixels(upload(frames, self._device))

    def from_pixels(self, pixels_bhwc: Tensor) -> Tensor:
        """Normalise uint8 RGB (B, H, W, 3) that lies on the device already."""
        if self._bgr:
            pixels_bhwc = pixels_bhwc.flip(3)
        return torch.addcmul(self._bias, pixels_bhwc.permute(0, 3, 1, 2).float(), self._scale)

    def _compiled(self, frames: NDArray[np.uint8]) -> Tensor:
        # Numba takes half a second to import, and GPUs need none.
        from segformer3d.native import normalise

        pixels = np.ascontiguousarray(frames[..., ::-1] if self._bgr else frames)
        x_bhwc = torch.empty(frames.shape)
        normalise(
            pixels, self._scale.flatten().numpy(), self._bias.flatten().numpy(), x_bhwc.numpy()
        )
        return x_bhwc.permute(0, 3, 1, 2)


class _Encoder:
    """Encodes by the modules, or on a CPU by their rearranged form.

    While somebody watches the modules by hooks, they run themselves. They are not kept for that:
    nobody can watch what is gone.
    """

    def __init__(self, modules: nn.Module) -> None:
        self._encode: Callable[[Tensor], list[Tensor]] = modules
        self._watchable: Callable[[], nn.Module | None] = weakref.ref(modules)
        on_cpu = next(modules.parameters()).device.type == "cpu"
        if on_cpu and isinstance(modules, MixTransformer):
            # Numba takes half a second to import, and GPUs need none.
            from segformer3d.cpu_encoder import CpuEncoder

            self._encode = CpuEncoder(modules)

    def __call__(self, x_bchw: Tensor) -> list[Tensor]:
        return (self.watched() or self._encode)(x_bchw)

    def watched(self) -> nn.Module | None:
        """The modules, if hooks are waiting there for frames."""
        modules = self._watchable()
        items = () if modules is None else modules.modules()
        has_hooks = any(item._forward_pre_hooks or item._forward_hooks for item in items)
        return modules if has_hooks else None


def masked(values: Tensor, finite_b: Tensor, fill: int) -> Tensor:
    """Fill the samples that are not finite; a CPU, where asking is free, skips the copy."""
    if values.device.type == "cpu" and finite_b.all():
        return values
    return torch.where(finite_b.view(-1, *(1,) * (values.ndim - 1)), values, fill)


def input_affine(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fold the preprocessing into one scale and one bias over 0..255: (3, 1, 1) each."""
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    scale, bias = 1 / (255 * std), -mean / std
    return scale.float().view(3, 1, 1).to(device), bias.float().view(3, 1, 1).to(device)


def _are_finite(out_bchw: Tensor) -> Tensor:
    """Whether all of a sample is finite, bool (B,): its extremes are, which one pass finds."""
    # As the heads lay them out: the other order would be a copy.
    least, most = out_bchw.permute(0, 2, 3, 1).flatten(1).aminmax(dim=1)
    return least.isfinite() & most.isfinite()
