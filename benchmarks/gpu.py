"""How fast the bare model is on a GPU, beside named peers and what the GPU could do.

    python -m benchmarks.gpu [--variants mit_b0,mit_b3,mit_b5] [--sizes 512x1024,1024x2048] [--json]

Frames start and results end in the host's memory. All of a variant and size run in one process,
once a round, in rotating order. The two floors are what a frame costs at least: its operations at
the rate of one large bfloat16 product, and the bytes that its maps move at the rate of one large
copy, both measured here.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.model import (
    Contestant,
    count_g,
    make_frames,
    parse_size,
    random_model,
    time_rounds,
    transformers_network,
)
from benchmarks.origin_eager import OriginEager, origin_network
from segformer3d.config import ModelConfig, mit_size
from segformer3d.gpu_lanes import CALLS_TO_RECORD
from segformer3d.heads import FoldedHeads
from segformer3d.predictor import Predictor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from benchmarks.model import Frames
    from segformer3d.config import WeightsInfo
    from segformer3d.model import Segformer3D

ORIGIN, OURS = "origin's eager float32", "ours"
TRANSFORMERS = "transformers, bfloat16, compiled, one head"
CLASS_IDS_EQUAL_MIN = 0.95  # random weights: in bfloat16, near ties fall either way
BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Result:
    """One variant at one size.

    Attributes:
        variant: Of the encoder.
        size: Height and width.
        frames_per_s: Median, by contestant.
        class_ids_equal: Share of the class ids of the origin's eager code that are ours.
        floor_operations: Frames/s that the matrix rate allows.
        floor_traffic: Frames/s that the memory allows.
    """

    variant: str
    size: tuple[int, int]
    frames_per_s: dict[str, float]
    class_ids_equal: float
    floor_operations: float
    floor_traffic: float


def main() -> None:
    """Measure and print."""
    given = _arguments()
    device = torch.device(given.device)
    rates = matrix_rate(device), copy_rate(device)
    said = _Listener()
    logging.getLogger("segformer3d").addHandler(said)
    if given.profile:
        for variant in given.variants.split(","):
            print("\n".join(profile(variant, parse_size(given.sizes.split(",")[0]), given)))
        return
    if not given.json:
        print("\n".join(heading(device, rates)), flush=True)
    for variant in tqdm(given.variants.split(","), file=sys.stderr, delay=2.0, leave=False):
        for size in given.sizes.split(","):
            result = measure(variant, parse_size(size), given, device, rates)
            # A row as it comes: whoever stops this keeps what there is.
            print(json.dumps(asdict(result)) if given.json else row(result), flush=True)
            torch.cuda.empty_cache()
    if said.lines:
        raise SystemExit(f"not as fast as it should be: {'; '.join(said.lines)}")


class _Listener(logging.Handler):
    """Keeps warnings: of kernels or graphs that could not be had, which ours then went without."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", default="mit_b0,mit_b3,mit_b5")
    parser.add_argument("--sizes", default="512x1024,1024x2048")
    parser.add_argument("--frames", type=int, default=256, help="a call; default: 256")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--micro-batch", type=int, help="default: the Predictor's own")
    parser.add_argument("--device", default="cuda", help="default: cuda; cpu tries the script out")
    parser.add_argument(
        "--transformers", default="mit_b0", help="variants; each size compiles for a minute or more"
    )
    parser.add_argument("--json", action="store_true", help="an object a line")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="where ours spends its time at the first size, instead",
    )
    given = parser.parse_args()
    if given.profile and given.device == "cpu":
        parser.error("--profile needs a GPU")
    return given


def measure(
    variant: str,
    size: tuple[int, int],
    given: argparse.Namespace,
    device: torch.device,
    rates: tuple[float, float],
) -> Result:
    """Compare all contestants."""
    model, info = random_model(ModelConfig(variant=variant, head_width=256))
    drawn = make_frames(size)
    frames = _repeated(drawn, given.frames)
    origin = OriginEager(origin_network(model), info.preprocessing)
    operations, moved = operations_of(model, drawn[0]), bytes_of(info.config, size)
    predictor = Predictor(model, info, device=device, micro_batch=given.micro_batch)
    contestants = [
        Contestant(OURS, partial(_ours, predictor)),
        Contestant(ORIGIN, partial(_origin, origin.to(device), device)),
    ]
    if variant in given.transformers.split(","):
        contestants.append(_transformers(info, device))
    # Twice, after which ours replays recorded graphs: what is compared is what is timed.
    for contestant in contestants:
        contestant.annotate(frames)
        contestant.annotate(frames)
    ours, theirs = (contestants[place].annotate(frames)[: len(drawn)] for place in (0, 1))
    equal = float(np.mean(ours == theirs))
    with tqdm(disable=True) as progress:
        times_ms = time_rounds(contestants, [frames], given.rounds, progress)
    return Result(
        variant=variant,
        size=size,
        frames_per_s={name: 1000 / statistics.median(ms) for name, ms in times_ms.items()},
        class_ids_equal=equal,
        floor_operations=rates[0] / operations,
        floor_traffic=rates[1] / moved,
    )


def profile(variant: str, size: tuple[int, int], given: argparse.Namespace) -> Iterator[str]:
    """Markdown of the kernels of ours, longest first."""
    model, info = random_model(ModelConfig(variant=variant, head_width=256))
    predictor = Predictor(model, info, device=given.device, micro_batch=given.micro_batch)
    frames = _repeated(make_frames(size), given.frames)
    for _ in range(CALLS_TO_RECORD + 1):
        predictor.predict(frames)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        predictor.predict(frames)
    yield f"| {variant} {size[0]}x{size[1]}: us a frame | calls | |"
    yield "|---|---|---|"
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.device_time_total)
    for kernel in kernels:
        us = kernel.device_time_total / len(frames)
        yield f"| {us:.2f} | {kernel.count} | `{kernel.key[:80]}` |"


def _repeated(drawn: Sequence[Frames], count: int) -> Frames:
    return np.concatenate([drawn[turn % len(drawn)] for turn in range(count)])


def _ours(predictor: Predictor, frames: Frames) -> NDArray[Any]:
    class_ids = predictor.predict(frames).class_ids
    assert class_ids is not None
    return class_ids


@torch.inference_mode()
def _origin(
    origin: OriginEager, device: torch.device, frames: Frames, chunk: int = 8
) -> NDArray[Any]:
    chunks = (frames[start : start + chunk] for start in range(0, len(frames), chunk))
    outs = [origin(torch.from_numpy(part).to(device)) for part in chunks]
    return np.concatenate([class_ids.cpu().numpy() for class_ids, _ in outs])


def _transformers(info: WeightsInfo, device: torch.device, chunk: int = 8) -> Contestant:
    """Its network with one head and random weights, compiled; class ids at full size."""
    # Else the second size would be compiled for any size, which is slower.
    torch._dynamo.reset()
    network = transformers_network(info.config).to(device, torch.bfloat16)
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1) * 255
        for values in (info.preprocessing.mean, info.preprocessing.std)
    )

    def one(pixels: torch.Tensor) -> torch.Tensor:
        x = ((pixels.permute(0, 3, 1, 2).float() - mean) / std).bfloat16()
        logits = network(pixel_values=x).logits
        resized = torch.nn.functional.interpolate(
            logits.float(), size=x.shape[2:], mode="bilinear", align_corners=False
        )
        return resized.argmax(1).to(torch.uint8)

    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(one, dynamic=False)

    @torch.inference_mode()
    def annotate(frames: Frames) -> NDArray[Any]:
        chunks = (frames[start : start + chunk] for start in range(0, len(frames), chunk))
        outs = [compiled(torch.from_numpy(part).to(device)) for part in chunks]
        return np.concatenate([out.cpu().numpy() for out in outs])

    return Contestant(TRANSFORMERS, annotate, same_weights=False)


@torch.inference_mode()
def operations_of(model: Segformer3D, frames: Frames) -> float:
    """Floating-point operations of a frame, heads folded."""
    heads = [head for head in (model.segmentation_head, model.depth_head) if head is not None]
    folded = FoldedHeads(heads)
    height, width = frames.shape[1:3]
    x = torch.zeros(1, 3, height, width)
    return 2e9 * count_g(lambda: folded(model.forward_features(x)))


def bytes_of(config: ModelConfig, size: tuple[int, int]) -> float:
    """Bytes that a frame moves at least, in bfloat16, with every block's norms and sums fused.

    Of each block: its tokens read and written by attention and by the Mix-FFN, queries and
    attention's output written and read, and the hidden map written and read before and after its
    convolution. Weights stay in the cache. In and out: the frame, the logits, class ids, depth.
    """
    height, width = size
    encoder = mit_size(config.variant)
    moved = 3.0 * height * width
    for stage, (dim, depth) in enumerate(zip(encoder.embed_dims, encoder.depths, strict=True)):
        tokens = height * width / 16 / 4**stage
        of_block = (4 + 4 + 4 * encoder.mlp_ratio) * dim
        moved += BF16_BYTES * tokens * (depth * of_block + 4 * dim)
    grid = height * width / 16
    return moved + height * width + grid * (2 * 4 * ((config.num_classes or 0) + 1) + 2)


def matrix_rate(device: torch.device, side: int = 8192, rounds: int = 10) -> float:
    """Operations a second of one large product in bfloat16."""
    side = side if device.type == "cuda" else 512
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / _seconds(lambda: x @ x, device, rounds)


def copy_rate(device: torch.device, count: int = 2**28, rounds: int = 10) -> float:
    """Bytes a second, read and written, of one large copy."""
    count = count if device.type == "cuda" else 2**22
    x = torch.zeros(count, device=device)
    y = torch.zeros(count, device=device)
    return 2 * 4 * count / _seconds(lambda: y.copy_(x), device, rounds)


def _seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def heading(device: torch.device, rates: tuple[float, float]) -> Iterator[str]:
    """What was measured where, and the head of a Markdown table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield f"{datetime.now(UTC):%Y-%m-%d}, {name}, torch {torch.__version__}"
    yield f"bfloat16 product {rates[0] / 1e12:.0f} T operations/s, copy {rates[1] / 1e9:.0f} GB/s"
    yield ""
    columns = ["ours", "x origin", "x transformers", "floor, operations", "floor, traffic"]
    yield f"| frames/s | {' | '.join(columns)} | class ids equal |"
    yield "|---|---|---|---|---|---|---|"


def row(result: Result) -> str:
    """One line of the table."""
    ours = result.frames_per_s[OURS]
    ratios = [
        f"{ours / result.frames_per_s[peer]:.1f}" if peer in result.frames_per_s else "-"
        for peer in (ORIGIN, TRANSFORMERS)
    ]
    floors = [
        f"{floor:.0f} ({ours / floor:.0%} reached)"
        for floor in (result.floor_operations, result.floor_traffic)
    ]
    height, width = result.size
    cells = [f"{result.variant} {height}x{width}", f"{ours:.0f}", *ratios, *floors]
    mark = "" if result.class_ids_equal >= CLASS_IDS_EQUAL_MIN else " TOO FEW"
    return f"| {' | '.join(cells)} | {result.class_ids_equal:.2%}{mark} |"


if __name__ == "__main__":
    main()
