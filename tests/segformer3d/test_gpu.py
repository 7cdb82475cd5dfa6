"""The GPU's path without a GPU: its kernels by Triton's interpreter, what wraps them on a CPU.

What only a GPU can show is in test_predictor.py, marked `gpu`.
"""

import functools
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from segformer3d import gpu_lanes
from segformer3d.config import METRIC_DEPTH, WeightsInfo
from segformer3d.gpu_lanes import CALLS_TO_REPLACE, LANES, SHAPES_MAX, Lanes
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is there on Linux only")
def test_kernels_compile_for_hopper(project_root, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.segformer3d.compiled_kernels"],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.stdout == "19 of 19 use tensor cores\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is there on Linux only")
def test_what_compiles_wrong_is_found(monkeypatch):
    from tests.segformer3d import compiled_kernels

    listing = """
        /*0010*/  UMOV UR4, URZ ;
        /*0020*/  UIADD3.X UR7, UR4, -0x7fffffe0, URZ, UP0, !UPT ;
        /*0030*/  ULEA UR8, UR4, UR8, 0x18 ;
        /*0040*/  UIADD3.X UR5, UR8, -0x7fffffe0, URZ, UP0, !UPT ;
        /*0050*/  UIADD3.X UR27, UR27, 0x40000040, URZ, UP0, !UPT ;
        /*0060*/  UMOV UR8, URZ ;
        /*0070*/  S2UR UR8, SR_CgaCtaId ;
        /*0080*/  UIADD3.X UR5, UR8, -0x7fffffe0, URZ, UP0, !UPT ;
        /*0090*/  UMOV UR9, URZ ;
        /*00a0*/  UIMAD.WIDE UR8, UR8, 0x2, UR4 ;
        /*00b0*/  UIADD3.X UR5, UR9, -0x7fffffe0, URZ, UP0, !UPT ;
    """
    shown = subprocess.CompletedProcess([], 0, stdout=listing)
    monkeypatch.setattr(compiled_kernels.subprocess, "run", lambda *_, **__: shown)
    wrong = compiled_kernels.wrong_addresses(b"")
    assert [line.split()[0] for line in wrong] == ["/*0040*/", "/*0050*/", "/*0080*/", "/*00b0*/"]


class LaneOnCpu:
    """What a lane does, without a stream: it computes when told to wait."""

    made = None

    def __init__(self, shape, annotate, device):
        self.annotate, self.started = annotate, []
        self.outs = annotate(torch.zeros(shape, dtype=torch.uint8))
        LaneOnCpu.made.append(shape)

    def start(self, frames, results):
        self.started.append((torch.from_numpy(frames.copy()), results))

    def end(self):
        started, self.started = self.started, []

        def wait():
            for pixels, results in started:
                for result, out in zip(results, self.annotate(pixels), strict=True):
                    if out is not None:
                        result.copy_(out)

        return wait


@pytest.fixture
def lanes(monkeypatch):
    monkeypatch.setattr(gpu_lanes, "_Lane", LaneOnCpu)
    monkeypatch.setattr(gpu_lanes, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
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
    wait = lanes.start(annotate, frames, width, (32, 32))
    chunks = [frames[start : start + width] for start in range(0, len(frames), width)]
    parts = (
        [lanes.run_without(annotate, chunk, (32, 32)) for chunk in chunks]
        if wait is None
        else [wait()]
    )
    assert all(part[1] is None for part in parts)
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), frames)
    return [len(part[0]) for part in parts]


def test_lanes_keep_frames_in_order(lanes):
    # Until it pays to record them, and where a lane would be wide for few, in pieces.
    assert run(lanes, frames_of(11)) == [4, 4, 3]
    for count in (11, 30, 4, 2, 1):
        assert run(lanes, frames_of(count)) == [count]
    assert LaneOnCpu.made == [(4, 32, 32, 3)] * LANES


def test_the_next_call_sets_out_before_the_last_one_is_waited_for(lanes):
    run(lanes, frames_of(8))
    all_frames = [frames_of(count) for count in (4, 9, 5, 12)]
    waits = [lanes.start(annotate, frames, 4, (32, 32)) for frames in all_frames]
    for frames, wait in reversed(list(zip(all_frames, waits, strict=True))):
        np.testing.assert_array_equal(wait()[0], frames)


def test_calls_take_the_lanes_in_turns(lanes, monkeypatch):
    run(lanes, frames_of(4))
    run(lanes, frames_of(4))
    turns = []
    for lane in (every := next(iter(lanes._lanes.values()))):
        monkeypatch.setattr(lane, "start", lambda *_, lane=lane: turns.append(every.index(lane)))
    for _ in range(2 * LANES):
        lanes.start(annotate, frames_of(4), 4, (32, 32))
    assert turns == [(turns[0] + call) % LANES for call in range(2 * LANES)]


def test_the_first_of_a_shape_is_not_recorded(lanes):
    run(lanes, frames_of(8))
    assert LaneOnCpu.made == []
    run(lanes, frames_of(8))
    assert len(LaneOnCpu.made) == LANES


def test_shapes_that_come_in_turns_are_not_recorded_each_time(lanes):
    shapes = [32 * (1 + shape) for shape in range(SHAPES_MAX + 2)]
    for _ in range(2 * CALLS_TO_REPLACE):
        for side in shapes:
            run(lanes, frames_of(1, side), width=1)
    assert SHAPES_MAX < len(LaneOnCpu.made) / LANES <= 2 * len(shapes)
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
        assert run(lanes, frames_of(6)) == [6]
    assert LaneOnCpu.made
    assert not caplog.records


@pytest.mark.parametrize("num_fitting", [1, 2])
def test_as_many_lanes_as_fit_will_do(lanes, monkeypatch, num_fitting):
    room = [num_fitting]

    class Scarce(LaneOnCpu):
        def __init__(self, *arguments):
            if not room[0]:
                raise torch.OutOfMemoryError("injected")
            room[0] -= 1
            super().__init__(*arguments)

    monkeypatch.setattr(gpu_lanes, "_Lane", Scarce)
    assert run(lanes, frames_of(11)) == [4, 4, 3]
    for count in (11, 30, 4):
        assert run(lanes, frames_of(count)) == [count]
    assert len(LaneOnCpu.made) == num_fitting
    # Of another shape none fits, until these are gone.
    for _ in range(2):
        assert run(lanes, frames_of(11, side=64)) == [4, 4, 3]
    assert not lanes._lanes
    room[0] = num_fitting
    assert run(lanes, frames_of(11, side=64)) == [11]


def test_results_that_cannot_be_pinned_come_all_the_same(lanes, monkeypatch):
    def refuse(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(gpu_lanes, "_pinned", refuse)
    for _ in range(3):
        run(lanes, frames_of(6))
    monkeypatch.setattr(gpu_lanes, "PINNED_BYTES_MAX", 6 * 32 * 32 * 3 - 1)
    monkeypatch.setattr(gpu_lanes, "_pinned", lambda *_: pytest.fail("more than is to be pinned"))
    assert run(lanes, frames_of(6)) == [6]


def test_what_was_given_back_is_not_recorded_again_at_once(lanes):
    for _ in range(2):
        run(lanes, frames_of(6))
    assert lanes.clear()
    assert run(lanes, frames_of(6)) == [4, 2]


class KernelStandIn:
    """What a kernel of Triton's does when launched: it hands its compiling to the mode there is."""

    def __init__(self, active_mode, errors):
        self.active_mode = active_mode
        self.device_caches, self.errors, self.threads = {0: ({}, "target")}, errors, set()

    def compile(self):
        self.threads.add(threading.get_ident())
        if self.errors:
            raise self.errors.pop()
        return "compiled"

    def run(self, *_, grid, warmup):
        cache = self.device_caches[0][0]
        if grid in cache:
            return
        mode = self.active_mode.get()
        if mode is None:
            cache[grid] = self.compile()
            return
        assert warmup
        finish = functools.partial(cache.__setitem__, grid)
        cache[grid] = mode.submit((id(self), grid), self.compile, finish)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
@pytest.mark.parametrize("interrupt", [False, True])
def test_kernels_compile_together_and_what_fails_is_tried_again(interrupt):
    from triton.runtime._async_compile import active_mode

    from segformer3d.gpu_launch import compile_together, launch

    good = KernelStandIn(active_mode, [])
    bad = KernelStandIn(active_mode, [RuntimeError("no room on the disk")])

    def run_all():
        for kernel in (good, bad):
            for side in (1, 2):
                launch(kernel, (side,))
        if interrupt:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if interrupt else nullcontext():
        compile_together(run_all)
    assert threading.get_ident() not in good.threads
    assert active_mode.get() is None
    assert good.device_caches[0][0] == {(1,): "compiled", (2,): "compiled"}
    assert list(bad.device_caches[0][0].values()) == ["compiled"]
    for side in (1, 2):
        launch(bad, (side,))
    assert bad.device_caches[0][0] == {(1,): "compiled", (2,): "compiled"}


class FullOfGraphs:
    """Lanes whose graphs leave no room, until they are cleared; a stand-in for a full GPU."""

    def __init__(self, *, fails_at_start):
        self.is_full, self.counts = True, []
        self.fails_at_start = fails_at_start

    def clear(self):
        was_full, self.is_full = self.is_full, False
        return was_full

    def start(self, annotate, frames, width, size):
        if self.is_full and self.fails_at_start:
            # As the driver says it.
            raise torch.AcceleratorError("CUDA error: out of memory")

    def run_without(self, annotate, frames, size):
        self.counts.append(len(frames))
        if self.is_full:
            raise torch.OutOfMemoryError("injected")
        return [np.zeros((len(frames), 1)), None, None, None, np.ones(len(frames), bool)]


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("fails_at_start", [False, True])
def test_graphs_give_way_before_frames_do(monkeypatch, micro_batch, fails_at_start):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    info = WeightsInfo(config=CONFIG, depth_codec=METRIC_DEPTH, training_data="tests")
    predictor = Predictor(varied_model(), info, micro_batch=micro_batch)
    predictor._lanes = FullOfGraphs(fails_at_start=fails_at_start)
    assert len(predictor.predict(frames_of(5)).finite) == 5
    tries = 1 if fails_at_start else 2
    assert predictor._lanes.counts[:tries] == [micro_batch] * tries
    assert sum(predictor._lanes.counts[tries - 1 :]) == 5
    assert not predictor._lanes.is_full
    assert predictor.micro_batch == micro_batch


def test_frames_are_uploaded_whatever_their_layout_without_a_word():
    frames = frames_of(3)
    frames.flags.writeable = False
    # Kernels read what is uploaded as if it were contiguous.
    for some in (frames, frames[1:], frames[:, ::-1, :, ::-1], frames.transpose(0, 2, 1, 3)):
        there = gpu_lanes.upload(some, torch.device("cpu"))
        assert there.is_contiguous()
        np.testing.assert_array_equal(there.numpy(), some)
