"""The GPU's path without a GPU: its kernels by Triton's interpreter, what wraps them on a CPU.

What only a GPU can show is in test_predictor.py, marked `gpu`.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from segformer3d import gpu_lanes
from segformer3d.config import METRIC_DEPTH, WeightsInfo
from segformer3d.gpu_lanes import CALLS_TO_REPLACE, SHAPES_MAX, Lanes
from segformer3d.predictor import Predictor
from tests.segformer3d.random_models import CONFIG, varied_model

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_by_the_interpreter(project_root, tmp_path):
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_, "--basetemp", str(tmp_path / "there"), str(INTERPRETED)],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout
    assert " passed in " in done.stdout.splitlines()[-1], done.stdout


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from segformer3d import gpu_kernels

def compiled(kernel, odd=False, **constants):
    types = {"low1_ptr": "*bf16", "low2_ptr": "*bf16", "low3_ptr": "*bf16", "finest_ptr": "*bf16"}
    types |= {"x_ptr": "*bf16", "weight_ptr": "*bf16" if kernel is heads else "*fp32"}
    out = {heads: "*fp32", ids: "*u8", convolution: "*bf16"}[kernel]
    signature = {
        name: "constexpr" if name in constants
        else out if name == "out_ptr"
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    # As at a launch: what 16 divides is said, and changes what the compiler makes of it.
    hints = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("outputs", "classes")
    }
    launch = gpu_kernels.HEADS_LAUNCH if kernel is heads else {}
    source = ASTSource(kernel, signature, constants, {} if odd else hints)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    # Two blocks of a kernel fit into a multiprocessor of a Hopper.
    assert made.metadata.shared <= 113 << 10, (kernel, constants, made.metadata.shared)
    return made.asm["ptx"]

heads, ids, convolution = (
    gpu_kernels._heads, gpu_kernels._class_ids, gpu_kernels._depthwise_gelu
)
compiled(convolution, PIXELS=gpu_kernels._PIXELS, CHANNELS=gpu_kernels._CHANNELS)
compiled(ids, ROW=gpu_kernels._ROW)
# Triton takes what is 1 for a constant, such as the sides of a small frame's last map.
compiled(ids, ROW=gpu_kernels._ROW, height=1, width=1)
compiled(ids, ROW=gpu_kernels._ROW, grid_h=1, grid_w=1, classes=1)
compiled(
    heads, CHANNELS=16, TILE=gpu_kernels._TILE, HIDDEN=gpu_kernels._HIDDEN, OUTPUTS=32,
    h3=1, w3=1, outputs=1, classes=1, odd=True,
)
compiled(convolution, PIXELS=gpu_kernels._PIXELS, CHANNELS=gpu_kernels._CHANNELS, height=1, width=1)
for channels in (32, 64):
    ptx = compiled(
        heads, CHANNELS=channels, TILE=gpu_kernels._TILE, HIDDEN=gpu_kernels._HIDDEN, OUTPUTS=32
    )
print("tensor cores" if "wgmma" in ptx else "none")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is there on Linux only")
def test_kernels_compile_for_hopper(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.stdout == "tensor cores\n", done.stderr


class LaneOnCpu:
    """What a lane does, without a stream: it computes when told to wait."""

    made = None

    def __init__(self, shape, annotate, device):
        self.pixels, self.annotate = torch.zeros(shape, dtype=torch.uint8), annotate
        self.waits = False
        LaneOnCpu.made.append(shape)

    def start(self, frames):
        assert not self.waits, "started before its last frames were taken"
        self.pixels[: len(frames)] = torch.from_numpy(frames.copy())
        self.waits = True

    def finish(self, count):
        self.waits = False
        return [None if out is None else out[:count].numpy() for out in self.annotate(self.pixels)]


@pytest.fixture
def lanes(monkeypatch):
    monkeypatch.setattr(gpu_lanes, "_Lane", LaneOnCpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(LaneOnCpu, "made", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return Lanes(torch.device("cpu"))


def annotate(pixels, size):
    return pixels.clone(), None


def frames_of(count, side=32):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def run(lanes, frames, width=4):
    parts = list(lanes.run(annotate, frames, width, (32, 32)))
    assert all(part[1] is None for part in parts)
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), frames)
    return [len(part[0]) for part in parts]


def test_lanes_keep_frames_in_order(lanes):
    for count, sizes in ((11, [4, 4, 3]), (30, [4] * 7 + [2]), (4, [4]), (2, [2]), (1, [1])):
        assert run(lanes, frames_of(count)) == sizes
    assert LaneOnCpu.made == [(4, 32, 32, 3)] * 2


def test_the_first_of_a_shape_is_not_recorded(lanes):
    run(lanes, frames_of(8))
    assert LaneOnCpu.made == []
    run(lanes, frames_of(8))
    assert len(LaneOnCpu.made) == 2


def test_shapes_that_come_in_turns_are_not_recorded_each_time(lanes):
    shapes = [32 * (1 + shape) for shape in range(SHAPES_MAX + 2)]
    for _ in range(2 * CALLS_TO_REPLACE):
        for side in shapes:
            run(lanes, frames_of(1, side), width=1)
    assert SHAPES_MAX < len(LaneOnCpu.made) / 2 <= 2 * len(shapes)
    assert len(lanes._lanes) == SHAPES_MAX


def test_what_cannot_be_recorded_runs_without(lanes, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(gpu_lanes, "_Lane", refuse)
    for _ in range(3):
        assert run(lanes, frames_of(6)) == [4, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "the GPU runs without recorded graphs: injected"
    ]


def test_a_recording_without_room_is_tried_again(lanes, monkeypatch, caplog):
    def refuse(*_):
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(gpu_lanes, "_Lane", refuse)
        for _ in range(3):
            assert run(lanes, frames_of(6)) == [4, 2]
    assert not LaneOnCpu.made
    for _ in range(3):
        assert run(lanes, frames_of(6)) == [4, 2]
    assert LaneOnCpu.made
    assert not caplog.records


class FullOfGraphs:
    """Lanes whose graphs leave no room, until they are cleared; a stand-in for a full GPU."""

    def __init__(self):
        self.is_full, self.widths = True, []

    def clear(self):
        was_full, self.is_full = self.is_full, False
        return was_full

    def run(self, annotate, frames, width, size):
        self.widths.append(width)
        if self.is_full:
            raise torch.OutOfMemoryError("injected")
        yield from ([np.zeros((len(frames), 1)), None, None, None, np.ones(len(frames), bool)],)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_graphs_give_way_before_frames_do(monkeypatch, micro_batch):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    info = WeightsInfo(config=CONFIG, depth_codec=METRIC_DEPTH, training_data="tests")
    predictor = Predictor(varied_model(), info, micro_batch=micro_batch)
    predictor._lanes = FullOfGraphs()
    assert len(predictor.predict(frames_of(1)).finite) == 1
    assert predictor._lanes.widths == [micro_batch] * 2
    assert predictor.micro_batch == micro_batch
