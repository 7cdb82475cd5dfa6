"""How fast the bare model is, from frame to class ids and depth, beside named peers on the CPU.

    python benchmarks/model.py [--variant mit_b3] [--size 512x1024] [--rounds 10] [--threads 1]

All run in one process, one after the other in every round and in rotating order, on the same
frames. Before any time is taken, those that hold the same weights must give the same outputs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.origin_eager import OriginEager, origin_network
from segformer3d.config import METRIC_DEPTH, ModelConfig, WeightsInfo, mit_size
from segformer3d.heads import FoldedHeads
from segformer3d.model import activate_depth, build_model
from segformer3d.predictor import Predictor
from segformer3d.scenes import make_drive, render
from segformer3d.weights import UNTRAINED_DEPTH_M, model_from_bytes
from segformer3d.weights_file import bundled_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from segformer3d.model import Segformer3D

    Frames = NDArray[np.uint8]
    Annotate = Callable[[Frames], NDArray[Any]]

ORIGIN, OURS = "origin's eager code", "ours"
NUM_FRAMES = 4
SCENE_AT_S = 5.0
CLASS_IDS_EQUAL_MIN = 0.9999
DEPTH_DIFFERENCE_MAX = 1e-3
GRID = 4  # the network's own grid has a fourth of the frame's sides
PROGRESS_AFTER_S = 2.0
PROFILE_ROWS = 25


@dataclass(frozen=True)
class Contestant:
    """One way from frames to class ids.

    Attributes:
        name: What it is called in tables.
        annotate: Frames, uint8 (B, H, W, 3), to class ids (B, H, W) of any integer type.
        same_weights: Whether its class ids must be ours.
    """

    name: str
    annotate: Annotate
    same_weights: bool = True


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near ours is to the origin's eager code.

    Attributes:
        class_ids_equal: By contestant with the same weights, the share of pixels as ours.
        depth_difference: The largest relative difference on the H / 4 grid, beyond one code.
        mixed_blocks: The share of 4x4 blocks of pixels with more than one class: what a tail that
            knows uniform blocks cannot skip.
    """

    class_ids_equal: Mapping[str, float]
    depth_difference: float
    mixed_blocks: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contestant's time.

    Attributes:
        name: Whose.
        median_ms: From frame to class ids, per frame.
        ratio: Its median over that of ours: how many times faster ours is.
    """

    name: str
    median_ms: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is printed.

    Attributes:
        machine: Processor, cores, load, and versions.
        date: When.
        model: Variant, head width, and where its weights are from.
        size: Height and width of the frames.
        threads: Threads of every contestant.
        rounds: How often each was timed.
        multiply_adds_g: Of one frame, in 10^9, by network.
        agreement: Of the outputs.
        timings: Of all contestants, in the order of the table.
        skipped: Contestants that could not run, and why.
    """

    machine: str
    date: str
    model: str
    size: tuple[int, int]
    threads: int
    rounds: int
    multiply_adds_g: Mapping[str, float]
    agreement: Agreement
    timings: Sequence[Timing]
    skipped: Sequence[str]


def main() -> None:
    """Measure and print."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    with tqdm(file=sys.stderr, delay=PROGRESS_AFTER_S, leave=False, unit="step") as progress:
        frames = make_frames(given.size)
        model, info, source = make_model(given)
        if given.profile:
            print(profile(model, info, frames, given.rounds))
            return
        report = measure(model, info, frames, given, source=source, progress=progress)
    if given.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print("\n".join(table(report)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="mit_b0", help="of the encoder (default: mit_b0)")
    parser.add_argument("--head-width", type=int, default=256, help="default: 256")
    parser.add_argument(
        "--weights",
        help="a weights file, or `bundled`; default: random parameters of the variant",
    )
    parser.add_argument("--size", type=parse_size, default=(512, 1024), help="default: 512x1024")
    parser.add_argument("--rounds", type=_positive, default=10, help="default: 10")
    parser.add_argument("--threads", type=_positive, default=1, help="default: 1")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument(
        "--profile", action="store_true", help="print a profile of ours instead of comparing"
    )
    return parser.parse_args()


def parse_size(text: str) -> tuple[int, int]:
    """Read a height and a width, such as 512x1024."""
    height, _, width = text.partition("x")
    size = int(height), int(width)
    if any(side < 32 or side % 32 for side in size):
        raise argparse.ArgumentTypeError("sides must be multiples of 32, such as 512x1024")
    return size


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def make_frames(size: tuple[int, int]) -> list[Frames]:
    """Draw street scenes: uint8 (1, H, W, 3) each."""
    height, width = size
    drives = (make_drive(seed) for seed in range(NUM_FRAMES))
    return [render(drive, SCENE_AT_S, width, height).frame[None] for drive in drives]


def make_model(given: argparse.Namespace) -> tuple[Segformer3D, WeightsInfo, str]:
    """Load or make the weights; give the model, what is known of it, and where it is from."""
    if given.weights is None:
        model, info = random_model(ModelConfig(variant=given.variant, head_width=given.head_width))
        return model, info, "random weights"
    is_bundled = given.weights == "bundled"
    data = bundled_weights() if is_bundled else Path(given.weights).read_bytes()
    model, info = model_from_bytes(data)
    # The origin has no such scaling by the frame's size; depths are compared without it.
    info = replace(info, short_side_px=None)
    return model, info, "bundled weights" if is_bundled else Path(given.weights).name


def random_model(config: ModelConfig) -> tuple[Segformer3D, WeightsInfo]:
    """Draw a model's parameters, and say what belongs to them."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    if model.depth_head is not None and model.depth_head.predict.bias is not None:
        # Around zero, half of all depths would be invalid.
        torch.nn.init.constant_(model.depth_head.predict.bias, UNTRAINED_DEPTH_M)
    info = WeightsInfo(config=config, depth_codec=METRIC_DEPTH, training_data="none", trained=False)
    return model, info


def measure(
    model: Segformer3D,
    info: WeightsInfo,
    frames: Sequence[Frames],
    given: argparse.Namespace,
    *,
    source: str,
    progress: tqdm[Any],
) -> Report:
    """Compare all contestants.

    Raises:
        SystemExit: Outputs that must be equal are not.
    """
    progress.set_description("counting")
    origin = OriginEager(origin_network(model), info.preprocessing)
    counted = multiply_adds_g(model, origin, frames[0])
    progress.update()
    # From here on the model is the predictor's.
    predictor = Predictor(model, info, device="cpu", threads=given.threads)
    contestants = [
        Contestant(ORIGIN, lambda frames: origin.frame_to_outputs(frames)[0]),
        Contestant(OURS, lambda frames: _class_ids(predictor, frames)),
    ]
    progress.set_description("preparing peers")
    peers, skipped = make_peers(origin, info.config, frames[0], given.threads)
    progress.update()
    contestants += peers
    progress.total = progress.n + len(contestants) + given.rounds
    progress.set_description("checking")
    agreement = check(contestants, origin, predictor, info, frames, progress)
    progress.set_description("timing")
    times_ms = time_rounds(contestants, frames, given.rounds, progress)
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    return Report(
        machine=machine(),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        model=f"{info.config.variant}, heads of {info.config.head_width}, {source}",
        size=given.size,
        threads=given.threads,
        rounds=given.rounds,
        multiply_adds_g=counted,
        agreement=agreement,
        timings=[
            Timing(name=name, median_ms=median, ratio=median / medians[OURS])
            for name, median in medians.items()
        ],
        skipped=skipped,
    )


def _class_ids(predictor: Predictor, frames: Frames) -> NDArray[np.uint8]:
    class_ids = predictor.predict(frames).class_ids
    assert class_ids is not None
    return class_ids


@torch.inference_mode()
def multiply_adds_g(model: Segformer3D, origin: OriginEager, frames: Frames) -> dict[str, float]:
    """Count the multiply-adds of the origin's network and of ours, heads folded, in 10^9.

    Matrix products, convolutions and attention count, whatever computes them in `Predictor`.
    """
    picture = origin.normalised(torch.from_numpy(frames))
    heads = [head for head in (model.segmentation_head, model.depth_head) if head is not None]
    folded = FoldedHeads(heads)
    return {
        ORIGIN: count_g(lambda: origin.network(picture)),
        OURS: count_g(lambda: folded(model.forward_features(picture))),
    }


def count_g(run: Callable[[], object]) -> float:
    """Count the multiply-adds of a call, in 10^9; parameters may lie on torch's meta device."""
    # The counter does not know the attention kernel of the CPU.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})
    with counter:
        run()
    return float(counter.get_total_flops()) / 2 / 1e9


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object
) -> int:
    """Floating-point operations of attention, from the shapes (B, A, N, D) and (B, A, M, D)."""
    b, a, n, d = query
    return 2 * b * a * n * key[2] * (d + value[3])


def make_peers(
    origin: OriginEager, config: ModelConfig, frames: Frames, threads: int
) -> tuple[list[Contestant], list[str]]:
    """Prepare what can be imported of the other runtimes; say what could not and why."""
    makers: list[tuple[str, tuple[str, ...], Callable[[], Contestant]]] = [
        ("transformers", ("transformers",), partial(_transformers, config)),
        (
            "ONNX Runtime, origin's graph",
            ("onnxruntime", "onnx", "onnxscript"),
            partial(_onnxruntime, origin, frames, threads),
        ),
        (
            "OpenVINO, origin's graph",
            ("openvino",),
            partial(_openvino, origin, frames, threads),
        ),
    ]
    peers, skipped = [], []
    for name, modules, make in makers:
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            skipped.append(f"{name}: skipped, not installed: {', '.join(missing)}")
        else:
            peers.append(make())
    return peers, skipped


def _transformers(config: ModelConfig) -> Contestant:
    """Its network with one head and random weights, its own processor before and after."""
    from transformers import SegformerImageProcessor

    network = transformers_network(config)
    processor = SegformerImageProcessor(do_resize=False)

    @torch.inference_mode()
    def annotate(frames: Frames) -> NDArray[Any]:
        outputs = network(**processor(images=list(frames), return_tensors="pt"))
        sizes = [frames.shape[1:3]] * len(frames)
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return np.stack([class_ids.numpy() for class_ids in maps])

    return Contestant("transformers, one head", annotate, same_weights=False)


def transformers_network(config: ModelConfig) -> Any:
    """Its network of that size with one head and random weights, in eval mode."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    size = mit_size(config.variant)
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_labels=config.num_classes,
            hidden_sizes=list(size.embed_dims),
            depths=list(size.depths),
            num_attention_heads=list(size.num_heads),
            sr_ratios=list(size.sr_ratios),
            decoder_hidden_size=config.head_width,
        )
    ).eval()


def _onnxruntime(origin: OriginEager, frames: Frames, threads: int) -> Contestant:
    """The origin's graph, from frames to class ids and depth."""
    onnxruntime = importlib.import_module("onnxruntime")
    program = torch.onnx.export(origin, (torch.from_numpy(frames),), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def annotate(frames: Frames) -> NDArray[Any]:
        class_ids: NDArray[Any] = session.run(None, {name: frames})[0]
        return class_ids

    return Contestant("ONNX Runtime, origin's graph", annotate)


def _openvino(origin: OriginEager, frames: Frames, threads: int) -> Contestant:
    """The origin's graph, from frames to class ids and depth, in float32."""
    openvino = importlib.import_module("openvino")
    graph = openvino.convert_model(origin, example_input=torch.from_numpy(frames))
    graph.reshape(list(frames.shape))
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(graph, "CPU", settings)

    def annotate(frames: Frames) -> NDArray[Any]:
        class_ids: NDArray[Any] = compiled(frames)[0]
        return class_ids

    return Contestant("OpenVINO, origin's graph", annotate)


def check(
    contestants: Sequence[Contestant],
    origin: OriginEager,
    predictor: Predictor,
    info: WeightsInfo,
    frames: Sequence[Frames],
    progress: tqdm[Any],
) -> Agreement:
    """Compare outputs on all frames, which also warms everybody up.

    Raises:
        SystemExit: Outputs that must be equal are not.
    """
    class_ids: dict[str, NDArray[Any]] = {}
    for contestant in contestants:
        class_ids[contestant.name] = np.concatenate([contestant.annotate(f) for f in frames])
        progress.update()
    equal = {
        contestant.name: float(np.mean(class_ids[contestant.name] == class_ids[OURS]))
        for contestant in contestants
        if contestant.same_weights and contestant.name != OURS
    }
    agreement = Agreement(
        class_ids_equal=equal,
        depth_difference=_depth_difference(origin, predictor, info, frames[0]),
        mixed_blocks=_mixed_blocks(class_ids[OURS]),
    )
    for name, share in equal.items():
        if share < CLASS_IDS_EQUAL_MIN:
            raise SystemExit(f"only {share:.4%} of the class ids of {name} are ours")
    if not agreement.depth_difference <= DEPTH_DIFFERENCE_MAX:
        raise SystemExit(f"depths differ by up to {agreement.depth_difference:.2g} of their value")
    return agreement


@torch.inference_mode()
def _depth_difference(
    origin: OriginEager, predictor: Predictor, info: WeightsInfo, frames: Frames
) -> float:
    """The largest relative difference of depth on the H / 4 grid, beyond one code step."""
    _, raw = origin.network.quarter(origin.normalised(torch.from_numpy(frames)))
    assert info.depth_codec is not None
    expected = info.depth_codec.encode(activate_depth(raw[:, 0], info.config).numpy())
    codes = predictor.predict(frames).depth
    assert codes is not None
    steps = np.abs(codes.astype(np.int64) - expected.astype(np.int64))
    return float(np.max(np.maximum(steps - 1, 0) / np.maximum(expected, 1)))


def _mixed_blocks(class_ids: NDArray[Any]) -> float:
    b, h, w = class_ids.shape
    blocks = class_ids.reshape(b, h // GRID, GRID, w // GRID, GRID)
    return float(np.mean(blocks.max((2, 4)) != blocks.min((2, 4))))


def time_rounds(
    contestants: Sequence[Contestant],
    frames: Sequence[Frames],
    rounds: int,
    progress: tqdm[Any],
) -> dict[str, list[float]]:
    """Time every contestant once a round, each round in another order; milliseconds a frame."""
    times_ms: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn in range(rounds):
        frame = frames[turn % len(frames)]
        first = turn % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            started = time.perf_counter()
            contestant.annotate(frame)
            times_ms[contestant.name].append(1000 * (time.perf_counter() - started) / len(frame))
        progress.update()
    return times_ms


def profile(model: Segformer3D, info: WeightsInfo, frames: Sequence[Frames], rounds: int) -> str:
    """Profile `Predictor.predict`, warm, and give torch's table of operators."""
    predictor = Predictor(model, info, device="cpu")
    predictor.predict(frames[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for turn in range(rounds):
            predictor.predict(frames[turn % len(frames)])
    return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILE_ROWS))


def machine() -> str:
    """Name the processor, its cores, the load, and the versions that count."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        cpu = names[0] if names else cpu
    load = os.getloadavg()[0]
    return f"{cpu}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}"


def table(report: Report) -> Iterator[str]:
    """Markdown."""
    height, width = report.size
    yield f"{report.date}, {report.machine}"
    yield f"{report.model}, {height}x{width}, {report.threads} threads, {report.rounds} rounds"
    yield ""
    yield "| from frame to class ids | median ms | ratio to ours |"
    yield "|---|---|---|"
    for timing in report.timings:
        yield f"| {timing.name} | {timing.median_ms:.1f} | {timing.ratio:.2f} |"
    yield ""
    for name, count in report.multiply_adds_g.items():
        yield f"multiply-adds of {name}: {count:.1f} G"
    for name, share in report.agreement.class_ids_equal.items():
        yield f"class ids of {name} that are ours: {share:.4%}"
    yield f"largest difference of depth: {report.agreement.depth_difference:.1g} of the value"
    yield f"4x4 blocks with more than one class: {report.agreement.mixed_blocks:.1%}"
    yield from report.skipped


if __name__ == "__main__":
    main()
