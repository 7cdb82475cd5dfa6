"""A file that would run code when unpickled runs none, whatever verb it is given to."""

import io
import json
import os
import pickle
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import cli
from pipeline.sinks.parquet import read_rows
from pipeline.tables import shards_from_table
from segformer3d.weights import untrained_weights
from tests.jobs.job_parts import TINY, make_job
from tests.media import encode_cv2, picture
from tests.segformer3d.training_parts import write_origin


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def zipped(payload):
    """As ``torch.save`` writes today."""
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "payload": payload}, file)
    return file.getvalue()


def legacy(payload):
    """As ``torch.save`` wrote before."""
    file = io.BytesIO()
    torch.save({"payload": payload}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def named_like_weights(payload):
    """The head of a safetensors file's names, a pickle for all that."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


FORMS = {"plain": pickle.dumps, "zipped": zipped, "legacy": legacy, "bare zip": named_like_weights}


@pytest.fixture
def mark(tmp_path):
    """The folder that a payload makes; a true unpickling makes it."""
    trial = tmp_path / "trial"
    pickle.loads(pickle.dumps(Payload(trial)))  # noqa: S301 - the control
    assert trial.is_dir()
    torch.load(io.BytesIO(zipped(Payload(tmp_path / "trial-2"))), weights_only=False)
    assert (tmp_path / "trial-2").is_dir()
    return tmp_path / "executed"


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("segformer3d: ")]
        assert (code, len(lines)) == (2, 1), captured.err
        assert "Traceback" not in captured.err + captured.out
        assert "weights_only" not in captured.err  # torch's advice is to trust it
        return lines[0]

    return call


@pytest.mark.parametrize("form", FORMS)
def test_no_verb_runs_what_a_weights_file_holds(run, mark, tmp_path, form):
    data = FORMS[form](Payload(mark))
    for name in ("w.pt", "w.pth", "w.bin", "w.safetensors", "w"):
        (tmp_path / name).write_bytes(data)
        assert "weights" in run("weights", "import", tmp_path / name, "out.safetensors")
    folder = tmp_path / "hub"
    folder.mkdir()
    config = {"architectures": ["SegformerForSemanticSegmentation"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(data)
    run("weights", "import", folder, "out.safetensors")
    (tmp_path / "a.jpg").write_bytes(encode_cv2(picture(), ".jpg"))
    hostile = tmp_path / "w.safetensors"
    run("weights", "show", hostile)
    for verb in ("predict", "attention"):
        run(verb, tmp_path / "a.jpg", "--weights", hostile, "--device", "cpu")
    run("evaluate", hostile, "scenes:?count=1", "--device", "cpu")
    for verb in ("plan", "run"):
        run(verb, "--input", tmp_path / "a.jpg", "--output", tmp_path / "job", "--weights", hostile)
    assert not mark.exists()
    assert not (tmp_path / "out.safetensors").exists()
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("form", FORMS)
def test_training_runs_nothing_of_its_checkpoint_or_its_start(
    run, mark, tmp_path, project_root, monkeypatch, form
):
    data = FORMS[form](Payload(mark))
    write_origin(tmp_path / "data", count=4)
    start = tmp_path / "start.safetensors"
    start.write_bytes(untrained_weights(TINY))
    (tmp_path / "hostile.safetensors").write_bytes(data)
    monkeypatch.setenv("ORIGIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ORIGIN_WEIGHTS", str(start))
    words = ["train", project_root / "configs" / "train" / "origin.yaml", "--device", "cpu"]
    words += ["--output", "training", "--set", f"model.variant={json.dumps(TINY)}"]
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "checkpoint.pt").write_bytes(data)
    line = run(*words)
    assert "checkpoint.pt: damaged" in line
    assert "remove it" in line
    (tmp_path / "training" / "checkpoint.pt").unlink()
    monkeypatch.setenv("ORIGIN_WEIGHTS", str(tmp_path / "hostile.safetensors"))
    assert "start.weights" in run(*words)
    assert not mark.exists()


def test_arrays_of_objects_are_not_unpickled(run, mark, tmp_path):
    import numpy as np

    write_origin(tmp_path / "data", count=2)
    (tmp_path / "tiny.safetensors").write_bytes(untrained_weights(TINY))
    place = next((tmp_path / "data" / "images" / "val").iterdir())
    np.save(place, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    run("evaluate", "tiny.safetensors", f"origin:{tmp_path / 'data'}", "--device", "cpu")
    assert not mark.exists()


def hostile_schema(schema, payload):
    """The schema with every field as the extension type that older Arrows unpickled on sight."""
    marks = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload,
    }
    return pa.schema([field.with_metadata(marks) for field in schema], schema.metadata)


def test_our_tables_are_not_unpickled(mark, tmp_path):
    job = make_job(tmp_path, num_images=2, bad=False)
    payload = pickle.dumps(Payload(mark))
    plan = job.store.read(job.plan.parts[0].key)
    table = pq.read_table(pa.BufferReader(plan))
    sink = pa.BufferOutputStream()
    hostile = pa.Table.from_arrays(table.columns, schema=hostile_schema(table.schema, payload))
    pq.write_table(hostile, sink)
    marks = pq.read_schema(pa.BufferReader(sink.getvalue())).field(0).metadata
    assert marks[b"ARROW:extension:metadata"] == payload
    again = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert shards_from_table(again) == job.shards
    rows = pa.table({"asset": ["a"], "frame_index": [1]})
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(rows.columns, schema=hostile_schema(rows.schema, payload)), sink
    )
    assert read_rows(sink.getvalue().to_pybytes()) == [{"asset": "a", "frame_index": 1}]
    assert not mark.exists()
