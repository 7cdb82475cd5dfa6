"""Micro-batches on their way through a GPU: three at a time, each recorded as a CUDA graph.

A lane is a stream with a graph and pinned memory for its frames; what comes back is copied to where
the caller finds it. While two lanes compute, the third copies, and the host, which only waits for
room for the next frames, is ahead of them: so far that the frames of the next call can set out
before those of the last one are through.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]
    Annotate = Callable[[Tensor, tuple[int, int]], Sequence[Tensor | None]]
    Key = tuple[int, tuple[int, ...], tuple[int, int]]
    Said = list[NDArray[np.generic] | None]

_log = logging.getLogger(__name__)

LANES = 3  # two that compute and one that copies
PINNED_BYTES_MAX = 2**30  # of one kind of results of a call
SHAPES_MAX = 4  # whose graphs are kept: each holds the memory of its activations
CALLS_TO_RECORD = 2  # recording does not pay for a single picture
CALLS_TO_REPLACE = 16  # nor does it where shapes that come in turns throw each other out


class Lanes:
    """Annotates frames by graphs that it records as shapes come back.

    Not for several threads at once; but any thread may wait for what was started.
    """

    def __init__(self, device: torch.device) -> None:
        """Take a CUDA device."""
        self._device = device
        self._lanes: OrderedDict[Key, list[_Lane]] = OrderedDict()
        self._calls: Counter[Key] = Counter()
        self._started = 0
        self._may_record = True

    def clear(self) -> bool:
        """Give all memory back; return whether graphs held any."""
        held = bool(self._lanes)
        torch.cuda.synchronize(self._device)
        self._lanes.clear()
        # Or they would be recorded at once again, and memory would be as short as before.
        self._calls.clear()
        if self._may_record:
            # After a recording that failed, the allocator would refuse.
            torch.cuda.empty_cache()
        return held

    def start(
        self, annotate: Annotate, frames: Frames, width: int, size: tuple[int, int]
    ) -> Callable[[], Said] | None:
        """Set out with frames, so many at a time as a lane is wide, if there are graphs for them.

        What is given may lie in pinned memory, which goes back to torch when nobody holds it.

        Args:
            annotate: Pixels, uint8 (B, H, W, 3) on the device, and the class ids' size, to what
                is wanted of them, B first; must not wait for the device. The same in every call.
            frames: uint8 (N, H, W, 3); copied before this returns.
            width: Frames at a time.
            size: Height and width of the class ids.

        Returns:
            What waits for the results, and gives them; None if these frames had better do without.

        Raises:
            RuntimeError: The device is lost, or has no memory left to run a graph.
        """
        # Less than half a lane's width is faster alone.
        if not len(frames) or 2 * len(frames) < width:
            return None
        lanes = self._lanes_for(annotate, (width, frames.shape[1:], size))
        if not lanes:
            return None
        results = [
            None if out is None else _results((len(frames), *out.shape[1:]), out.dtype)
            for out in lanes[0].outs
        ]
        for start in range(0, len(frames), width):
            own = slice(start, min(start + width, len(frames)))
            parts = [None if result is None else result[own] for result in results]
            # In turns from one call to the next, too.
            lanes[self._started % len(lanes)].start(frames[own], parts)
            self._started += 1
        ends = [(lane, lane.end()) for lane in lanes]

        def wait() -> Said:
            # The lanes live until then, whatever becomes of this object.
            for _, end in ends:
                end()
            return [None if result is None else result.numpy() for result in results]

        return wait

    def run_without(self, annotate: Annotate, frames: Frames, size: tuple[int, int]) -> Said:
        """Annotate frames as they are, without a graph.

        Raises:
            torch.OutOfMemoryError: They do not fit into memory.
        """
        outs = annotate(upload(frames, self._device), size)
        return [None if out is None else out.cpu().numpy() for out in outs]

    def _lanes_for(self, annotate: Annotate, key: Key) -> Sequence[_Lane]:
        """The lanes of a shape, none while recording them would not pay."""
        if key in self._lanes:
            self._lanes.move_to_end(key)
            return self._lanes[key]
        self._calls[key] += 1
        is_full = len(self._lanes) == SHAPES_MAX
        if not self._may_record or self._calls[key] < (
            CALLS_TO_REPLACE if is_full else CALLS_TO_RECORD
        ):
            return ()
        if is_full:
            self._drop(1)
        lanes = self._record(annotate, key)
        if lanes:
            self._lanes[key] = lanes
        return lanes

    def _drop(self, count: int) -> None:
        """Let the graphs go that were used longest ago, once nothing that they do is under way."""
        torch.cuda.synchronize(self._device)
        for _ in range(count):
            self._calls[self._lanes.popitem(last=False)[0]] = 0

    def _record(self, annotate: Annotate, key: Key) -> list[_Lane]:
        from triton.errors import TritonError

        (width, shape, size), device = key, self._device
        lanes: list[_Lane] = []
        try:
            # A recording that fails may not give the stream back.
            with torch.cuda.stream(torch.cuda.current_stream(device)):
                for _ in range(LANES):
                    lanes += [_Lane((width, *shape), lambda pixels: annotate(pixels, size), device)]
        except torch.OutOfMemoryError:
            # What fits will do, if it is not only that those of other shapes hold memory: then the
            # next call may try again.
            if len(lanes) < 2 and self._lanes:
                self._drop(len(self._lanes))
                return []
        except (RuntimeError, TritonError) as error:
            # Raises if the device is lost; if it is not, the same goes without a recording.
            torch.cuda.synchronize(self._device)
            _log.warning("the GPU runs without recorded graphs: %s", error)
            self._may_record = False
            return []
        return lanes


def upload(frames: Frames, device: torch.device) -> Tensor:
    """Copy frames, which may be read-only, to a device."""
    return _tensor(frames).contiguous().to(device)


def _results(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for results, pinned while it is not too much: torch keeps what is, for the next."""
    if math.prod(shape) * dtype.itemsize <= PINNED_BYTES_MAX:
        try:
            return _pinned(shape, dtype)
        except RuntimeError as error:
            _log.debug("results are copied to plain memory: %s", error)
    return torch.empty(shape, dtype=dtype)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class _Borrowed:
    """An array's memory, said to be writable: torch wants it so, and only reads."""

    def __init__(self, array: Frames) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = array.__array_interface__ | {"data": (address, False)}
        self._owner = array


def _tensor(frames: Frames) -> Tensor:
    """Give frames to torch, which knows neither read-only ones nor those that go backwards."""
    if min(frames.strides) < 0:
        frames = np.ascontiguousarray(frames)
    return torch.from_numpy(frames if frames.flags.writeable else np.asarray(_Borrowed(frames)))


class _Lane:
    """One stream, its buffers and its graph.

    Attributes:
        outs: What the graph writes, on the device; B first.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        annotate: Callable[[Tensor], Sequence[Tensor | None]],
        device: torch.device,
    ) -> None:
        # torch leaves streams and events untyped.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            # Once before recording: libraries set themselves up when first called on a stream.
            annotate(self._pixels)
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self.outs = annotate(self._pixels)
        # Threads that wait in turns would each keep a core busy.
        self._has_room = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def start(self, frames: Frames, results: Sequence[Tensor | None]) -> None:
        """Set out with as many frames as the lane is wide, or fewer: the rest stays as it is.

        Waits for room only, where `results` are pinned.
        """
        self._has_room.synchronize()
        # Of several threads, unlike NumPy's.
        self._staging[: len(frames)].copy_(_tensor(frames))
        with torch.cuda.stream(self._stream):
            self._pixels.copy_(self._staging, non_blocking=True)
            self._has_room.record(self._stream)
            self._graph.replay()
            for result, out in zip(results, self.outs, strict=True):
                if result is not None and out is not None:
                    result.copy_(out[: len(frames)], non_blocking=True)

    def end(self) -> Callable[[], None]:
        """What waits, in any thread, for all that was started until now: results are written."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        wait: Callable[[], None] = event.synchronize
        return wait
