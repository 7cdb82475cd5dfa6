"""``train`` as a person runs it: kills, signals, limits, workers, mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from jobs import cli
from segformer3d.weights import load_weights, untrained_weights
from segformer3d.weights_file import read_info
from tests.integration.cluster import listening
from tests.segformer3d.training_parts import TINY, write_origin

RUN = """
import torch
torch.set_num_threads(1)
from jobs import cli
cli.main()
"""
FROZEN = ("encoder.", "segmentation_head.")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.run(["train", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def origin(tmp_path, project_root, monkeypatch):
    """The shipped recipe of the origin, over a tiny data set and a tiny network."""
    write_origin(tmp_path / "data", count=8)
    (tmp_path / "start.safetensors").write_bytes(untrained_weights(TINY))
    monkeypatch.setenv("ORIGIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ORIGIN_WEIGHTS", str(tmp_path / "start.safetensors"))
    config = project_root / "configs" / "train" / "origin.yaml"
    changes = {
        "model.variant": TINY,
        "short_side_px": 32,
        "phases.0.crop_px": [32, 64],
        "phases.0.batch": 2,
        "phases.0.epochs": 6,
        "checkpoint_minutes": 1e-9,
        "validation.every_steps": 8,
    }
    sets = [word for k, v in changes.items() for word in ("--set", f"{k}={json.dumps(v)}")]
    return [str(config), "--device", "cpu", *sets]


def start(arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, "train", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def await_checkpoint(folder, process):
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_in(folder):
    return torch.load(folder / "checkpoint.pt")["progress"]["step"]


def test_the_origin_s_recipe_survives_a_kill_bit_for_bit(origin, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish(start([*origin, "--output", str(unbroken)]))
    killed = start([*origin, "--output", str(broken)])
    await_checkpoint(broken, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 0 < steps_in(broken) < 24
    out, err = finish(start([*origin, "--output", str(broken)]))
    assert "Going on after step" in err
    assert out.startswith("done: 24 of 24 steps")
    ours, theirs = (load_weights(f / "last.safetensors").state_dict() for f in (broken, unbroken))
    before = load_weights(tmp_path / "start.safetensors").state_dict()
    assert ours.keys() == theirs.keys() == before.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert torch.equal(value, before[name]) == name.startswith(FROZEN), name
    for name in ("last.safetensors", "best.safetensors"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()
    assert read_info(broken / "last.safetensors").depth_codec.kind == "relative"
    metrics = (broken / "log.csv").read_text()
    assert "24,val.loss," in metrics
    assert metrics == (unbroken / "log.csv").read_text()


def test_a_signal_ends_the_step_and_says_how_to_go_on(origin, tmp_path):
    folder = tmp_path / "out"
    process = start([*origin, "--output", str(folder), "--set", "phases.0.epochs=5000"])
    await_checkpoint(folder, process)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process, 130)
    assert out.startswith("interrupted: ")
    assert "go on with: segformer3d train " in err
    assert f"{steps_in(folder)} of 20000 steps" in out
    assert (folder / "last.safetensors").exists()


def test_a_time_limit_is_no_failure(origin, tmp_path, run):
    arguments = [*origin, "--output", tmp_path / "out", "--max-minutes", "1e-9", "--json"]
    code, out, err = run(*arguments)
    fields = json.loads(out)
    assert (code, fields["outcome"], fields["step"], fields["num_steps"]) == (0, "stopped", 1, 24)
    assert "--set" in fields["go_on"]
    assert f"go on with: {fields['go_on']}" in err
    code, out, _ = run(*arguments)
    assert (code, json.loads(out)["step"]) == (0, 2)


def test_torchrun_s_environment_is_honoured(origin, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = [*origin, "--output", str(tmp_path / "out"), "--set", "phases.0.epochs=1"]
    ranks = [start(arguments, RANK=str(rank), LOCAL_RANK="0", **common) for rank in (0, 1)]
    (out, _), (other, _) = (finish(process) for process in ranks)
    assert out.startswith("done: 4 of 4 steps")
    assert other == ""


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_of_ray_train_are_one_process(origin, tmp_path):
    changes = [word for item in ("phases.0.epochs=1", "freeze=[]") for word in ("--set", item)]
    one, two = tmp_path / "one", tmp_path / "two"
    out, _ = finish(start([*origin, *changes, "--output", str(one), "--json"]))
    arguments = [*origin, *changes, "--output", str(two), "--json", "--num-workers", "2"]
    process, heard = start(arguments), set()
    while process.poll() is None:
        heard |= listening(process.pid)
        time.sleep(1)  # a look at all its processes takes a while
    together, err = finish(process)
    assert "127.0.0.1" in heard
    assert heard <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    ours, theirs = json.loads(out), json.loads(together)
    assert theirs["outcome"] == "done"
    assert theirs["step"] == ours["step"] == 4
    assert theirs["metrics"]["val.loss"] == pytest.approx(ours["metrics"]["val.loss"], rel=0.02)
    for line in err.splitlines():
        assert line.startswith(("Starting Ray", "training:", "step 4:")), line
    assert not (two / ".ray").exists()
    # Going on with another number of workers is allowed.
    out, _ = finish(start([*origin, *changes, "--output", str(two), "--json"]))
    assert json.loads(out)["step"] == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.yaml"], "none.yaml: No such file"),
        (["RECIPE", "--set", "speed"], "write --set section.key=value"),
        (["RECIPE", "--set", "speed=1"], "unknown key speed"),
        (["RECIPE", "--set", "seed=[1"], "not YAML"),
        (["RECIPE", "--num-workers", "0"], "at least 1"),
        (["RECIPE", "--max-minutes", "-1"], "more than 0"),
        (["RECIPE", "--set", "data.0.dataset=camvid:${NOT_SET_AT_ALL}"], "NOT_SET_AT_ALL is not"),
        (["RECIPE", "--set", "data.0.dataset=camvid:/nowhere"], "/nowhere"),
        (["RECIPE", "--set", "data.0.dataset=cats:/nowhere"], "no data set kind 'cats'"),
        (["RECIPE", "--set", "start.weights=none.safetensors"], "No such file"),
        (["RECIPE", "--device", "toaster"], "device"),
        (["RECIPE", "--output", "s3://bucket/x"], "local folder"),
        (["RECIPE", "--output", "FILE/x"], "cannot make the folder"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(
    run, tmp_path, monkeypatch, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": {"variant": TINY, "head_width": 8},
        "data": [{"dataset": "scenes:?count=2"}],
        "phases": [{"steps": 1, "crop_px": [64, 64], "batch": 2}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "FILE").write_text("x")
    words = ["recipe.yaml" if word == "RECIPE" else word for word in arguments]
    words += [] if "--output" in words else ["--output", "out"]
    words += [] if "--device" in words else ["--device", "cpu"]
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


def test_one_training_at_a_time_in_a_folder(origin, tmp_path, run):
    import fcntl

    folder = tmp_path / "out"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run(*origin, "--output", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "another training is at work" in err


def test_a_loss_that_is_not_finite_is_a_failure(origin, tmp_path, run):
    changes = ["--set", "optimizer.rate=1e30", "--set", "schedule.kind=constant"]
    code, out, err = run(*origin, *changes, "--output", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "the loss is not finite at step" in err.splitlines()[-1]
    assert steps_in(tmp_path / "out") >= 1


def test_weights_say_in_words_which_heads_they_lack(tmp_path):
    from dataclasses import replace

    from jobs.weights import describe
    from segformer3d.config import ORIGIN_DEPTH, ModelConfig, WeightsInfo
    from segformer3d.model import build_model
    from segformer3d.weights import save_weights

    path = tmp_path / "w.safetensors"
    config = ModelConfig(variant=TINY, head_width=8, has_depth=False)
    info = WeightsInfo(config=config, depth_codec=None, training_data="nothing")
    save_weights(path, build_model(config), info)
    heads = describe(str(path))["heads"]
    assert heads == "segmentation of 19 classes; no depth head: a job's depth is null"
    config = replace(config, num_classes=None, has_depth=True)
    info = WeightsInfo(config=config, depth_codec=ORIGIN_DEPTH, training_data="nothing")
    save_weights(path, build_model(config), info)
    heads = describe(str(path))["heads"]
    assert heads.startswith("no segmentation head: a job's class_ids are null; relative depth")
