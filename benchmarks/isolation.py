"""What it costs that frames are decoded in a child process.

    python -m benchmarks.isolation [--rounds 15]

Decodes the same shards in this process and through the child, in turn; prints the shortest times,
their ratio and the difference per shard; the CPU time of both processes together, which other work
disturbs less; and what starting a child costs.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import psutil

from pipeline import decode_child
from pipeline.decode import DecodeLimits, DecodeWorker
from pipeline.decode_messages import DecodeItem, DecodeRequest, Event
from pipeline.geometry import UInt8Array
from pipeline.records import Asset, ShardSpec, Slice
from pipeline.sources.listing import list_assets
from pipeline.sources.slicing import slice_asset
from pipeline.sources.video_file import quiet_ffmpeg
from pipeline.storage import StorageOptions, open_store
from tests.media import encode_cv2, picture, write_video

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = DecodeLimits()
INPUT_SIZE = (1024, 512)


class _NoPulse(decode_child._Pulse):
    """Nobody listens."""

    def __init__(self) -> None:
        self.num_frames = 0

    def emit(self, event: Event) -> None:
        """Count good frames."""
        self.num_frames += event[0] == "frame"

    def beat(self) -> None:
        """Nobody waits."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(1)
    quiet_ffmpeg()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        worker = stack.enter_context(DecodeWorker(LIMITS))
        print(
            "| shard | here ms | child ms | ratio | more ms | here CPU ms | child CPU ms | more |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name, spec in _shards(Path(folder), worker).items():
            print(_row(name, spec, worker, rounds))
        print(f"\nstarting a child: {1000 * _start_s(rounds):.0f} ms")


def _shards(folder: Path, worker: DecodeWorker) -> dict[str, ShardSpec]:
    """Shards of 64 frames: JPEGs at the model's input size, and a video."""
    (folder / "images").mkdir()
    (folder / "small").mkdir()
    (folder / "video").mkdir()
    for index in range(64):
        data = encode_cv2(picture(1024, 512, seed=index), ".jpg")
        (folder / "images" / f"{index:03d}.jpg").write_bytes(data)
        (folder / "small" / f"{index:03d}.jpg").write_bytes(
            encode_cv2(picture(96, 64, seed=index), ".jpg")
        )
    write_video(folder / "video" / "a.mp4", num_frames=64, size=(1024, 512), gop=32)
    return {
        "64 JPEGs of 1024x512": _shard(folder / "images", worker, INPUT_SIZE),
        "64 frames of H.264 1024x512": _shard(folder / "video", worker, INPUT_SIZE),
        "64 JPEGs of 96x64": _shard(folder / "small", worker, (96, 64)),
    }


def _shard(folder: Path, worker: DecodeWorker, size: tuple[int, int]) -> ShardSpec:
    assets = list_assets(open_store(str(folder))).assets
    probes = worker.probe_assets(str(folder), assets)
    parts: list[Slice] = [part for probe in probes for part in slice_asset(probe)]
    return ShardSpec(
        shard_id=0,
        root=str(folder),
        input_width_px=size[0],
        input_height_px=size[1],
        slices=tuple(parts),
    )


def _row(name: str, spec: ShardSpec, worker: DecodeWorker, rounds: int) -> str:
    assert np.array_equal(_in_process(spec), worker.decode_shard(spec).pixels)
    times: dict[str, list[float]] = {"here": [], "child": []}
    cpu = {"here": 0.0, "child": 0.0}
    ways: dict[str, Callable[[], object]] = {
        "here": lambda: _in_process(spec),
        "child": lambda: worker.decode_shard(spec),
    }
    for _ in range(rounds):
        for way, call in ways.items():
            started_cpu, started = _cpu_s(worker), time.perf_counter()
            call()
            times[way].append(1000 * (time.perf_counter() - started))
            cpu[way] += 1000 * (_cpu_s(worker) - started_cpu) / rounds
    here, child = (min(times[way]) for way in ways)
    more = cpu["child"] - cpu["here"]
    return (
        f"| {name} | {here:.1f} | {child:.1f} | {child / here:.3f} | {child - here:+.1f} |"
        f" {cpu['here']:.1f} | {cpu['child']:.1f} | {more:+.1f} |"
    )


def _cpu_s(worker: DecodeWorker) -> float:
    """CPU seconds so far of this process and of the child."""
    times = psutil.Process(worker.pid).cpu_times()
    return time.process_time() + times.user + times.system


def _in_process(spec: ShardSpec) -> UInt8Array:
    """What the child does, by the same code, into memory of this process."""
    size = spec.input_width_px, spec.input_height_px
    slot, items = 0, []
    for part in spec.slices:
        slots = tuple(range(slot, slot + len(part.frame_index)))
        items.append(DecodeItem(part=part, slots=slots))
        slot += len(slots)
    request = DecodeRequest(
        root=spec.root, storage=StorageOptions(), limits=LIMITS, size=size, items=tuple(items)
    )
    pixels = np.empty((spec.num_frames, size[1], size[0], 3), np.uint8)
    pulse = _NoPulse()
    decode_child.decode_items(request, pixels, pulse)
    assert pulse.num_frames == spec.num_frames
    return pixels


def _start_s(rounds: int) -> float:
    """Until a fresh child has answered."""
    nothing = Asset(path="nothing.jpg", kind="image", size_bytes=1, etag="")
    spent = []
    for _ in range(max(3, rounds // 3)):
        started = time.perf_counter()
        with DecodeWorker(LIMITS) as worker:
            worker.probe_assets("/", [nothing])
        spent.append(time.perf_counter() - started)
    return min(spent)


if __name__ == "__main__":
    main()
