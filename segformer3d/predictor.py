"""Predictor: uint8 RGB frames in; class ids, depth codes and per-frame statistics out.

The only inference path of the project. Normalising, channel order and quantising happen on the
device; heads run folded; what leaves the device is uint8, uint16 and a few numbers per frame.

Shapes, also at the end of names: b batch, h and w the frame's sides, k classes, and q the
grid of h / 4 by w / 4.
"""

from __future__ import annotations

import logging
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from segformer3d.config import DEPTH_CODE_MAX, DEPTH_INVALID
from segformer3d.encoder import MixTransformer
from segformer3d.gpu_lanes import Lanes
from segformer3d.heads import FoldedHeads
from segformer3d.model import activate_depth
from segformer3d.network import Input, Network, masked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from segformer3d.config import DepthCodec, Preprocessing, WeightsInfo
    from segformer3d.model import Segformer3D
    from segformer3d.network import Outputs

_log = logging.getLogger(__name__)

SIDE_MULTIPLE = 32
IGNORE_ID = 255
MICRO_BATCH_GPU = 16
COPY_THREADS = 4
BATCHES_GPU = 4  # so many micro-batches at a time hide the copies of all but the first and last


@dataclass(frozen=True)
class Predictions:
    """What is known of B frames; a head that the weights lack gives None.

    From a GPU, arrays may be parts of one block of pinned memory, which lasts as long as any of
    them: copy what is to be kept for long.

    Attributes:
        class_ids: uint8 (B, H, W), or at the size asked for; 255 in frames that are not finite.
        depth: uint16 (B, H / 4, W / 4), codes of the weights' depth codec, 0 where invalid.
        confidence_mean: float32 (B,), mean over the H / 4 grid of the largest class probability.
        entropy_mean: float32 (B,), mean over the H / 4 grid of the class entropy, in nats.
        finite: bool (B,), False where a frame's logits, or what the depth head says before it is
            made metres, are not all finite.
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
            micro_batch: Frames per forward pass; by default 16 on a GPU and 1 on a CPU, where
                more only spill the caches.
            threads: CPU threads of torch in this whole process; by default left alone. Beside a
                GPU, which waits for its frames to be copied, 4 at least.

        Raises:
            ValueError: `info` belongs to another model, or `micro_batch` is not positive.
        """
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, not {micro_batch}")
        if model.config != info.config:
            raise ValueError(f"info describes {info.config}, but the model is {model.config}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_cpu = self.device.type == "cpu"
        if threads is not None:
            torch.set_num_threads(threads if on_cpu else max(threads, COPY_THREADS))
        self.micro_batch = micro_batch or (1 if on_cpu else MICRO_BATCH_GPU)
        self._num_threads = torch.get_num_threads() if on_cpu and micro_batch is None else 1
        self.batch = max(self.micro_batch * (1 if on_cpu else BATCHES_GPU), self._num_threads)
        model.eval().to(self.device)
        heads = [head for head in (model.segmentation_head, model.depth_head) if head is not None]
        self._has_segmentation = model.segmentation_head is not None
        folded = FoldedHeads(heads)
        self._input = Input(info.preprocessing, self.device)
        self._network = Network(model, folded)
        self._codec = info.depth_codec
        self._config = info.config
        metric = info.depth_codec is not None and info.depth_codec.kind == "metric"
        self._short_side_px = info.short_side_px if metric else None
        self._lanes: Lanes | None = None
        if self.device.type == "cuda":
            fused = _gpu_network(model, folded, info.preprocessing)
            if fused is not None:
                self._fused, self._lanes = fused, Lanes(self.device)

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
        return self.start(frames, class_ids_size=class_ids_size)()

    def start(
        self, frames: NDArray[np.uint8], *, class_ids_size: tuple[int, int] | None = None
    ) -> Callable[[], Predictions]:
        """Begin to annotate frames, as `predict` does; a GPU is still at work when this returns.

        So the next frames can be there before the last ones are done. On a CPU, and while nothing
        is recorded for frames of this shape, all is done at once.

        Args:
            frames: As of `predict`; not needed any more when this returns.
            class_ids_size: As of `predict`.

        Returns:
            What waits for the predictions and gives them, in whatever thread; it raises
            torch.AcceleratorError if the device is lost.

        Raises:
            ValueError: As of `predict`.
            torch.OutOfMemoryError: As of `predict`.
        """
        _check(frames)
        size = class_ids_size or (frames.shape[1], frames.shape[2])
        wait = self._start_on_gpu(frames, size)
        if wait is not None:
            return lambda: _predictions(wait())
        predictions = self._predict_at_once(frames, size)
        return lambda: predictions

    def _start_on_gpu(
        self, frames: NDArray[np.uint8], size: tuple[int, int]
    ) -> Callable[[], Sequence[Any]] | None:
        """What waits for recorded graphs; None if there are none, or no memory left for them."""
        if self._lanes is None or self._network.is_watched():
            return None
        try:
            # Triton launches on the current device, wherever its tensors are.
            with torch.cuda.device(self.device):
                return self._lanes.start(self._annotate_on_gpu, frames, self.micro_batch, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self._lanes.clear()
        return None

    def _predict_at_once(self, frames: NDArray[np.uint8], size: tuple[int, int]) -> Predictions:
        in_threads = self._num_threads > 1 and self.micro_batch == 1 and len(frames) > 1
        if in_threads and not self._network.is_watched():
            return self._predict_in_threads(frames, size)
        parts: list[Predictions] = []
        start = 0
        while start < len(frames):
            for part in self._predict_while_it_fits(frames[start:], size):
                parts.append(part)
                start += len(part.finite)
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

    def _predict_while_it_fits(
        self, frames: NDArray[np.uint8], size: tuple[int, int]
    ) -> Iterator[Predictions]:
        """Annotate micro-batches; where memory runs out, make room or smaller ones, and end."""
        micro_batch = min(self.micro_batch, len(frames))
        try:
            yield from self._predict_micro_batches(frames, size)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # What its traceback holds, nobody could free.
            shortage = torch.OutOfMemoryError(str(error))
        if self._lanes is not None and self._lanes.clear():
            return
        if micro_batch == 1:
            raise shortage
        self.micro_batch = micro_batch // 2
        if self.device.type == "cuda" and self._lanes is None:
            torch.cuda.empty_cache()

    def _predict_micro_batches(
        self, frames: NDArray[np.uint8], size: tuple[int, int]
    ) -> Iterator[Predictions]:
        for start in range(0, len(frames), self.micro_batch):
            chunk = frames[start : start + self.micro_batch]
            if self._lanes is None or self._network.is_watched():
                yield self._predict(chunk, size)
                continue
            with torch.cuda.device(self.device):
                yield _predictions(self._lanes.run_without(self._annotate_on_gpu, chunk, size))

    @torch.inference_mode()
    def _predict(self, frames: NDArray[np.uint8], size: tuple[int, int]) -> Predictions:
        outputs = self._network(self._input.from_frames(frames), size)
        codes = self._codes(outputs, min(frames.shape[1:3]))
        return _predictions([None if code is None else code.cpu().numpy() for code in codes])

    @torch.inference_mode()
    def _annotate_on_gpu(
        self, pixels_bhwc: Tensor, size: tuple[int, int]
    ) -> Sequence[Tensor | None]:
        return self._codes(self._fused(pixels_bhwc, size), min(pixels_bhwc.shape[1:3]))

    def _codes(self, outputs: Outputs, short_side_px: int) -> Sequence[Tensor | None]:
        """Finish what the network says, on the device: the fields of `Predictions`."""
        finite_b, class_ids, depth = outputs.finite_b, outputs.class_ids, None
        if class_ids is not None:
            class_ids = masked(class_ids, finite_b, IGNORE_ID)
        if outputs.depth_bq is not None and self._codec is not None:
            metres = activate_depth(outputs.depth_bq, self._config)
            codes = _encode_depth(metres * self._depth_factor(short_side_px), self._codec)
            depth = masked(codes, finite_b, DEPTH_INVALID).to(torch.uint16)
        return class_ids, depth, outputs.confidence_b, outputs.entropy_b, finite_b

    def _depth_factor(self, short_side_px: int) -> float:
        """What a frame's size does to its depth: twice the size looks twice as near."""
        return short_side_px / self._short_side_px if self._short_side_px else 1.0


def _encode_depth(depth: Tensor, codec: DepthCodec) -> Tensor:
    """Encode as `DepthCodec.encode` does, on the device, as int32."""
    values = depth.abs() if codec.absolute_value else depth
    valid = values.isfinite() & (values > 0)
    codes = (torch.where(valid, values, 0) * codec.scale).round().clamp(1, DEPTH_CODE_MAX)
    return torch.where(valid, codes, DEPTH_INVALID).to(torch.int32)


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


def _gpu_network(
    model: Segformer3D, heads: FoldedHeads, preprocessing: Preprocessing
) -> Callable[[Tensor, tuple[int, int]], Outputs] | None:
    """The network by kernels of our own; None, with a warning, where they cannot be had."""
    if not isinstance(model.encoder, MixTransformer):
        return None
    try:
        from triton.errors import TritonError

        from segformer3d.gpu_launch import compile_together
        from segformer3d.gpu_network import GpuNetwork
    except ImportError as error:
        _log.warning("the GPU runs without fused kernels: %s", error)
        return None
    try:
        network = GpuNetwork(model, heads, preprocessing)
        device = next(model.parameters()).device
        with torch.inference_mode(), torch.cuda.device(device):
            # Triton compiles anew for sides of 1 and for sides that 16 divides: both, while what
            # cannot be compiled can still be done without.
            squares = [
                torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
                for side in (SIDE_MULTIPLE, 16 * SIDE_MULTIPLE)
            ]
            compile_together(partial(_run_all, network, squares))
            _run_all(network, squares)
            torch.cuda.synchronize(device)
    except torch.AcceleratorError:
        raise
    except (
        *(TritonError, RuntimeError, ValueError, OSError, AssertionError),
        subprocess.SubprocessError,
    ) as error:
        # Triton builds its launcher with a C compiler, which not every machine has; it asserts
        # that there is a driver.
        _log.warning("the GPU runs without fused kernels: %s", error)
        return None
    return network


def _run_all(network: Callable[[Tensor, tuple[int, int]], Outputs], squares: list[Tensor]) -> None:
    for pixels_bhwc in squares:
        network(pixels_bhwc, (pixels_bhwc.shape[1], pixels_bhwc.shape[2]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device is merely full; cuBLAS, Triton and the driver say so in their own words."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "ALLOC_FAILED" in said)
    )


def _predictions(said: Sequence[Any]) -> Predictions:
    return Predictions(
        **dict(zip((field.name for field in fields(Predictions)), said, strict=True))
    )


def _joined(parts: list[Predictions]) -> Predictions:
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for field in fields(Predictions):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = None if values[0] is None else np.concatenate(values)
    return Predictions(**joined)
