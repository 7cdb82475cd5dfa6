"""The command line: exit codes, one-line complaints, JSON; nothing here starts Ray."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import cli
from jobs.lease import Heartbeat, beat, is_cancelled, take_lease
from segformer3d.weights import model_from_bytes, untrained_weights, weights_to_bytes
from tests.jobs.job_parts import TINY, finish_job, make_job, tiny_weights


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def job(tmp_path):
    return make_job(tmp_path)


def complaint(result):
    """The one line of a refused command."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("segformer3d: ")]
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run"], "missing key input (or --input)"),
        (["run", "--input", "/nowhere/at/all", "--output", "OUT"], "no such folder"),
        (["run", "none.yaml"], "no such job file"),
        (["run", "--input", "IN", "--output", "OUT", "--set", "model.threads=99999"], "1024"),
        (["run", "--input", "IN", "--output", "OUT", "--set", "speed=3"], "unknown key speed"),
        (["run", "--input", "IN", "--output", "OUT", "--set", "shard.frames=x"], "got 'x'"),
        (["run", "--input", "http://a/b", "--output", "OUT"], "unsupported storage scheme"),
        (["run", "--input", "zip::s3://a", "--output", "OUT"], "chained URLs"),
        (["run", "--input", "IN", "--output", "FILE/job"], "cannot make the folder"),
        (["run", "--input", "IN", "--output", "FULL"], "is not empty and holds no job"),
        (["run", "--input", "IN", "--output", "OUT", "--weights", "none.st"], "No such file"),
        (["run", "--input", "IN", "--output", "OUT", "--weights", "FILE"], "weights"),
        (["run", "--input", "EMPTY", "--output", "OUT"], "no image, video or tar here"),
        (["plan", "--input", "EMPTY", "--output", "OUT"], "no image, video or tar here"),
        (["status", "IN"], "no job here"),
        (["verify", "IN"], "no job here"),
        (["cancel", "IN"], "no job here"),
        (["resume", "IN"], "no job here"),
        (["resume", "JOB", "--set", "shard.frames=3"], "takes only ray.KEY"),
        (["list", "/nowhere/at/all"], "no such folder"),
        (["weights", "show", "FILE"], "weights"),
        (["weights", "show", "none.safetensors"], "weights"),
        (["weights", "import", "none.pt", "OUT"], "no such file"),
        (["weights", "import", "FILE", "OUT"], "weights"),
        (["weights", "import", "/dev/zero", "OUT"], "/dev/zero: neither a file nor a folder"),
        (["train", "x.yaml", "--output", "OUT", "--num-workers", "99999"], "x<=10000"),
        (["fly"], "No such command"),
        (["demo", "--folder", "FILE"], "cannot write there: "),
        (["demo", "--folder", "/proc/x"], "cannot write there: "),
        (["run", "--speed", "3"], "No such option"),
        (["submit", "--input", "IN", "--output", "OUT"], "Missing option"),
        (
            ["submit", "--input", "IN", "--output", "OUT", "--address", "http://127.0.0.1:9"],
            "RAY_AUTH_MODE=token",
        ),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(
    run, job, tmp_path, monkeypatch, arguments, expected
):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "photo.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    words = {
        "IN": job.spec.input.url,
        "JOB": job.store.url,
        "OUT": str(tmp_path / "out"),
        "FILE": str(tmp_path / "file"),
        "FULL": str(tmp_path / "full"),
        "EMPTY": str(tmp_path / "empty"),
        "FILE/job": str(tmp_path / "file" / "job"),
    }
    assert expected in complaint(run(*[words.get(word, word) for word in arguments]))


def test_another_job_s_output_is_refused(run, job, tmp_path):
    weights = tmp_path / "tiny.safetensors"
    weights.write_bytes(untrained_weights(TINY))
    line = complaint(
        run(
            *("run", "--input", job.spec.input.url, "--output", job.store.url),
            *("--weights", weights, "--set", "shard.frames=2", "--set", "output.png=true"),
        )
    )
    assert "holds another job" in line
    assert "geometry.short_side_px: 64 there, 512 asked" in line


def test_no_permission_on_s3(run, job, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    line = complaint(run("status", "s3://out/job"))
    assert "wrong" not in line


def test_plan_says_what_would_be_done(run, job, tmp_path):
    weights = tmp_path / "tiny.safetensors"
    weights.write_bytes(untrained_weights(TINY))
    arguments = ["plan", "--input", job.spec.input.url, "--output", tmp_path / "new"]
    arguments += ["--weights", weights, "--set", "shard.frames=2"]
    arguments += ["--set", "geometry.short_side_px=64"]
    code, out, _ = run(*arguments, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["plan"]["plan_id"] == job.plan.plan_id
    assert (report["plan"]["num_frames"], report["plan"]["num_known_errors"]) == (11, 1)
    assert report["estimate"]["time_s"] > 0
    assert report["estimate"]["output_bytes"] > 0
    assert not (tmp_path / "new").exists()
    code, out, _ = run(*arguments)
    assert "frames  11, 1 of them unreadable" in out


def test_status_list_and_verify_as_json(run, job, tmp_path):
    job.publish([0])
    code, out, _ = run("status", job.store.url, "--json")
    assert (code, json.loads(out)["state"]) == (0, "interrupted")
    code, out, _ = run("list", tmp_path, "--json")
    assert [found["url"] for found in json.loads(out)] == [job.store.url]
    code, out, _ = run("verify", job.store.url, "--json")
    assert (code, json.loads(out)["sound"], json.loads(out)["complete"]) == (1, True, False)
    job.publish(range(1, job.plan.num_shards))
    finish_job(job)
    code, out, _ = run("verify", job.store.url)
    assert code == 0
    assert "sound and complete" in out


def test_cancel_asks_live_drivers_only(run, job):
    code, out, _ = run("cancel", job.store.url)
    assert (code, out.strip()) == (0, "no driver works on this job")
    lease = take_lease(job.store, "running")
    dead = take_lease(job.store, "running")
    beat(job.store, Heartbeat.now(dead, "ended"))
    code, out, _ = run("cancel", job.store.url, "--json")
    assert [item["lease"] for item in json.loads(out)] == [lease]
    assert is_cancelled(job.store, lease)
    assert not is_cancelled(job.store, dead)


def test_weights_show_without_a_name_is_the_card_of_those_in_the_box(run):
    code, out, _ = run("weights", "show")
    assert code == 0
    for word in ("CamVid", "trying out", "camvid.mean_iou", "sha256"):
        assert word in out


def test_weights_show(run, tmp_path):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(untrained_weights(TINY))
    code, out, _ = run("weights", "show", path, "--json")
    assert code == 0
    assert json.loads(out)["trained"] is False


def test_weights_that_end_early_are_not_shown_as_good(run, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(untrained_weights(TINY)[:-100])
    assert "bytes of tensors instead of" in complaint(run("weights", "show", path))


@pytest.mark.parametrize("verb", ["status", "weights import"])
def test_standard_output_on_a_full_disk(job, tmp_path, verb):
    finish_job(job)
    (tmp_path / "w.safetensors").write_bytes(tiny_weights())
    words = {
        "status": ["status", job.store.url],
        "weights import": ["weights", "import", tmp_path / "w.safetensors", tmp_path / "to.st"],
    }
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *words[verb]],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == (
        "segformer3d: standard output cannot be written: No space left on device\n"
    )


def test_weights_show_sends_a_terminal_nothing_but_text(run, tmp_path):
    path = tmp_path / "tiny.safetensors"
    model, info = model_from_bytes(untrained_weights(TINY))
    odd = replace(info, training_data="\x1b]0;owned\x07 of\nmine")
    path.write_bytes(weights_to_bytes(model, odd))
    code, out, _ = run("weights", "show", path)
    assert code == 0
    assert "training_data: \ufffd]0;owned\ufffd of mine" in out.splitlines()
    code, out, _ = run("weights", "show", path, "--json")
    assert json.loads(out)["training_data"] == odd.training_data


def test_help_needs_neither_torch_nor_ray():
    program = (
        "import sys\nfrom jobs import cli\n"
        "assert cli.run(['--help']) == 0\n"
        "assert not {'torch', 'ray', 'cv2'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    for verb in ("demo", "plan", "run", "submit", "status", "list", "resume", "cancel", "verify"):
        assert f"  {verb} " in done.stdout


def test_publish_workers_never_import_torch():
    program = (
        "import sys\nimport pipeline.stages, pipeline.decode_child\n"
        "from pipeline.stages import DecodeShard, PublishShard\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_traceback_is_told_without_credentials(monkeypatch, capsys):
    canary = "canary-5b1e-never-shown"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canary)
    monkeypatch.setattr(cli, "run", lambda _: 0)
    for module, name in ((sys, "excepthook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    with pytest.raises(SystemExit):
        cli.main(["status", "x"])

    def fail():
        raise RuntimeError(f"signing with {canary} for https://host/x?X-Amz-Signature={canary}")

    try:
        fail()
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert said.count("Traceback (most recent call last)") == 2
    assert said.count("RuntimeError: signing with *** for https://host/x?***") == 2
    assert canary not in said
