"""Predictor: uint8 RGB frames in; class ids, depth codes and per-frame statistics out.

The only inference path of the project. Normalising, channel order and quantising happen on the
device; heads run folded; what leaves the device is uint8, uint16 and a few numbers per frame.

Shapes, also at the end of names: b batch, h and w the frame's sides, k classes, and q the
grid of h / 4 by w / 4.
"""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from segformer3d.class_ids import resolve_class_ids
from segformer3d.config import DEPTH_CODE_MAX, DEPTH_INVALID
from segformer3d.encoder import MixTransformer
from segformer3d.heads import FoldedHeads
from segformer3d.model import activate_depth

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from segformer3d.config import DepthCodec, Preprocessing, WeightsInfo
    from segformer3d.model import Segformer3D

SIDE_MULTIPLE = 32
IGNORE_ID = 255
MICRO_BATCH_GPU = 8


@dataclass(frozen=True)
class Predictions:
    """What is known of B frames; a head that the weights lack gives None.

    Attributes:
        class_ids: uint8 (B, H, W), or at the size asked for; 255 in frames that are not finite.
        depth: uint16 (B, H / 4, W / 4), codes of the weights' depth codec, 0 where invalid.
        confidence_mean: float32 (B,), mean over the H / 4 grid of the largest class probability.
        entropy_mean: float32 (B,), mean over the H / 4 grid of the class entropy, in nats.
        finite: bool (B,), False where a frame's logits or depth are not all finite.
    """

    class_ids: NDArray[np.uint8] | None
    depth: NDArray[np.uint16] | None
    confidence_mean: NDArray[np.float32] | None
    entropy_mean: NDArray[np.float32] | None
    finite: NDArray[np.bool_]


class Predictor:
    """A model ready to annotate frames.

    Attributes:
        device: Where it runs.
        micro_batch: Frames per forward pass; halves for good when memory runs out.
        batch: Frames that it would like to have at a time: a micro-batch, or on a CPU one for each
            thread, for a frame a thread is faster than many threads on one frame.
    """

    def __init__(
        self,
        model: Segformer3D,
        info: WeightsInfo,
        *,
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Take a model over: it is put in eval mode and moved to the device.

        Args:
            model: The network.
            info: What belongs to its weights; preprocessing and depth codec are used.
            device: Where to run; by default the GPU if there is one.
            micro_batch: Frames per forward pass; by default 8 on a GPU and 1 on a CPU, where
                more only spill the caches.
            threads: CPU threads of torch in this whole process; by default left alone.

        Raises:
            ValueError: `info` belongs to another model, or `micro_batch` is not positive.
        """
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, not {micro_batch}")
        if model.config != info.config:
            raise ValueError(f"info describes {info.config}, but the model is {model.config}")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_cpu = self.device.type == "cpu"
        self.micro_batch = micro_batch or (1 if on_cpu else MICRO_BATCH_GPU)
        self._num_threads = torch.get_num_threads() if on_cpu and micro_batch is None else 1
        self.batch = max(self.micro_batch, self._num_threads)
        model.eval()
        heads = [head for head in (model.segmentation_head, model.depth_head) if head is not None]
        self._has_segmentation = model.segmentation_head is not None
        self._encode = _Encoder(model.encoder.to(self.device))
        self._heads = FoldedHeads(heads).to(self.device)
        self._codec = info.depth_codec
        self._config = info.config
        metric = info.depth_codec is not None and info.depth_codec.kind == "metric"
        self._short_side_px = info.short_side_px if metric else None
        self._bgr = info.preprocessing.channel_order == "bgr"
        self._scale, self._bias = input_affine(info.preprocessing, self.device)

    def predict(
        self, frames: NDArray[np.uint8], *, class_ids_size: tuple[int, int] | None = None
    ) -> Predictions:
        """Annotate frames.

        Args:
            frames: uint8 (B, H, W, 3), RGB; H and W are multiples of 32. May be read-only.
            class_ids_size: Height and width of the class ids, resolved from the logits; by
                default the frames' own.

        Raises:
            ValueError: The frames have another type or shape.
            torch.OutOfMemoryError: Not even one frame fits into memory.
        """
        _check(frames)
        size = class_ids_size or (frames.shape[1], frames.shape[2])
        in_threads = self._num_threads > 1 and self.micro_batch == 1 and len(frames) > 1
        if in_threads and self._encode.watched() is None:
            return self._predict_in_threads(frames, size)
        parts: list[Predictions] = []
        start = 0
        while start < len(frames):
            chunk = frames[start : start + self.micro_batch]
            part = self._predict_if_it_fits(chunk, size)
            if part is not None:
                parts.append(part)
                start += len(chunk)
        return _joined(parts or [self._empty(frames, size)])

    def _predict_in_threads(self, frames: NDArray[np.uint8], size: tuple[int, int]) -> Predictions:
        ones = (frames[index : index + 1] for index in range(len(frames)))
        # How many threads torch starts is each thread's own setting. They end with this call: what
        # lived on could still be there when the process ends.
        with ThreadPoolExecutor(
            self._num_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as threads:
            return _joined(list(threads.map(lambda one: self._predict(one, size), ones)))

    def _empty(self, frames: NDArray[np.uint8], size: tuple[int, int]) -> Predictions:
        """Give the predictions of no frames, of the right types and shapes."""
        _, height, width, _ = frames.shape
        none = np.zeros(0, np.float32) if self._has_segmentation else None
        return Predictions(
            class_ids=np.zeros((0, *size), np.uint8) if self._has_segmentation else None,
            depth=np.zeros((0, height // 4, width // 4), np.uint16) if self._codec else None,
            confidence_mean=none,
            entropy_mean=none,
            finite=np.zeros(0, np.bool_),
        )

    def _predict_if_it_fits(
        self, frames: NDArray[np.uint8], size: tuple[int, int]
    ) -> Predictions | None:
        """Annotate one micro-batch; halve the micro-batch and return None if memory runs out."""
        try:
            return self._predict(frames, size)
        except torch.OutOfMemoryError:
            if len(frames) == 1:
                raise
        self.micro_batch = len(frames) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _predict(self, frames: NDArray[np.uint8], size: tuple[int, int]) -> Predictions:
        with self._autocast():
            outs = self._heads(self._encode(self._input(frames)))
        finite_b = torch.stack([_are_finite(out) for out in outs]).all(0)
        class_ids = confidence = entropy = depth = None
        if self._has_segmentation:
            # What is not finite has no largest class.
            logits = self._masked(outs[0], finite_b, 0)
            class_ids, confidence, entropy = resolve_class_ids(logits, size)
            class_ids = self._masked(class_ids, finite_b, IGNORE_ID)
        if self._codec is not None:
            metres = activate_depth(outs[-1][:, 0], self._config)
            metres = metres * self._depth_factor(min(frames.shape[1:3]))
            codes = _encode_depth(metres, self._codec)
            depth = self._masked(codes, finite_b, DEPTH_INVALID).to(torch.uint16)
        return Predictions(
            class_ids=_numpy(class_ids),
            depth=_numpy(depth),
            confidence_mean=_numpy(confidence),
            entropy_mean=_numpy(entropy),
            finite=finite_b.cpu().numpy(),
        )

    def _masked(self, values: Tensor, finite_b: Tensor, fill: int) -> Tensor:
        """Fill the samples that are not finite; a CPU, where asking is free, skips the copy."""
        if self.device.type == "cpu" and finite_b.all():
            return values
        return torch.where(finite_b.view(-1, *(1,) * (values.ndim - 1)), values, fill)

    def _depth_factor(self, short_side_px: int) -> float:
        """What a frame's size does to its depth: twice the size looks twice as near."""
        return short_side_px / self._short_side_px if self._short_side_px else 1.0

    def _input(self, frames: NDArray[np.uint8]) -> Tensor:
        """Normalise frames on the device: float32 (B, 3, H, W), channels last."""
        if self.device.type == "cpu":
            return self._cpu_input(frames)
        staging = torch.empty(
            frames.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        staging.numpy()[...] = frames
        pixels_bchw = staging.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        if self._bgr:
            pixels_bchw = pixels_bchw.flip(1)
        return torch.addcmul(self._bias, pixels_bchw.float(), self._scale)

    def _cpu_input(self, frames: NDArray[np.uint8]) -> Tensor:
        from segformer3d.native import normalise

        pixels = np.ascontiguousarray(frames[..., ::-1] if self._bgr else frames)
        x_bhwc = torch.empty(frames.shape)
        normalise(
            pixels, self._scale.flatten().numpy(), self._bias.flatten().numpy(), x_bhwc.numpy()
        )
        return x_bhwc.permute(0, 3, 1, 2)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()


class _Encoder:
    """Encodes by the modules, or on a CPU by their rearranged form.

    While somebody watches the modules by hooks, they run themselves. They are not kept for that:
    nobody can watch what is gone.
    """

    def __init__(self, modules: nn.Module) -> None:
        on_cpu = next(modules.parameters()).device.type == "cpu"
        self._encode: Callable[[Tensor], list[Tensor]] = modules
        self._watchable: Callable[[], nn.Module | None] = lambda: None
        if on_cpu and isinstance(modules, MixTransformer):
            # Numba takes half a second to import, and GPUs need none.
            from segformer3d.cpu_encoder import CpuEncoder

            self._encode, self._watchable = CpuEncoder(modules), weakref.ref(modules)

    def __call__(self, x_bchw: Tensor) -> list[Tensor]:
        return (self.watched() or self._encode)(x_bchw)

    def watched(self) -> nn.Module | None:
        """The modules, if hooks are waiting there for frames, one after the other."""
        modules = self._watchable()
        items = () if modules is None else modules.modules()
        has_hooks = any(item._forward_pre_hooks or item._forward_hooks for item in items)
        return modules if has_hooks else None


def _are_finite(out_bchw: Tensor) -> Tensor:
    """Whether all of a sample is finite, bool (B,): its extremes are, which one pass finds."""
    least, most = out_bchw.flatten(1).aminmax(dim=1)
    return least.isfinite() & most.isfinite()


def _encode_depth(depth: Tensor, codec: DepthCodec) -> Tensor:
    """Encode as `DepthCodec.encode` does, on the device, as int32."""
    values = depth.abs() if codec.absolute_value else depth
    valid = values.isfinite() & (values > 0)
    codes = (torch.where(valid, values, 0) * codec.scale).round().clamp(1, DEPTH_CODE_MAX)
    return torch.where(valid, codes, DEPTH_INVALID).to(torch.int32)


def input_affine(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fold the preprocessing into one scale and one bias over 0..255: (3, 1, 1) each."""
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    scale, bias = 1 / (255 * std), -mean / std
    return scale.float().view(3, 1, 1).to(device), bias.float().view(3, 1, 1).to(device)


def _check(frames: NDArray[np.uint8]) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(
            f"frames must be uint8 of shape (B, H, W, 3), not {frames.dtype} {frames.shape}"
        )
    height, width = frames.shape[1:3]
    if not height or not width or height % SIDE_MULTIPLE or width % SIDE_MULTIPLE:
        raise ValueError(
            f"frames are {height} x {width}, but both sides must be multiples of {SIDE_MULTIPLE}: "
            "resize them first"
        )


def _numpy(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.cpu().numpy()


def _joined(parts: list[Predictions]) -> Predictions:
    joined: dict[str, Any] = {}
    for field in fields(Predictions):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = None if values[0] is None else np.concatenate(values)
    return Predictions(**joined)
