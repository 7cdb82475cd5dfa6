"""What is shipped, and what the README promises of it."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"segformer3d", "pipeline", "jobs", "configs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    program = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_our_packages_and_nothing_else(wheel):
    names = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == TOP_LEVEL
    assert not [name for name in wheel.namelist() if "test" in name or name.endswith(".pyc")]


def test_the_wheel_holds_templates_and_one_script(wheel):
    assert {"configs/jobs/job.schema.json", "configs/jobs/dashcam.yaml"} <= set(wheel.namelist())
    assert "segformer3d/py.typed" in wheel.namelist()
    (scripts,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert re.findall(r"^\w+ = .*$", wheel.read(scripts).decode(), re.MULTILINE) == [
        "segformer3d = jobs.cli:main"
    ]


def test_no_file_names_a_registry_a_machine_or_is_too_large():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    # Spelled in parts, or this file would name what it looks for.
    forbidden = re.compile(
        "|".join(
            ("pypi" + r"\.org", "python" + "hosted", "/root" + "/", "index-" + "url =")
        ).encode()
    )
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        if not path.exists():
            continue
        assert path.stat().st_size < 20e6, name
        assert not forbidden.search(path.read_bytes()), name


def test_the_lock_is_hashed_and_names_no_index():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line for line in lines if re.match(r"[a-z0-9]", line)]
    assert len(pinned) > 150
    assert all("==" in line for line in pinned)
    assert not [line for line in lines if "://" in line]
    assert sum("--hash=sha256:" in line for line in lines) > len(pinned)


def test_the_readme_s_verbs_exist():
    from jobs.cli import cli

    named = set(re.findall(r"^segformer3d (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named >= {"plan", "run", "status", "resume", "cancel", "verify", "list", "weights"}
    assert named <= set(cli.commands)


def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    import numpy as np

    from segformer3d.weights import untrained_weights

    monkeypatch.chdir(tmp_path)
    Path("street.safetensors").write_bytes(untrained_weights("mit:16,32,80,128:1,2,2,1"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = (block for block in blocks if "Predictor" in block)
    names = {"frames": np.zeros((1, 64, 96, 3), np.uint8)}
    exec(snippet, names)  # noqa: S102  the README's own lines
    assert names["said"].class_ids.shape == (1, 64, 96)
