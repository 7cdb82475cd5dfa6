"""The verb `evaluate` from its command line: tables, JSON, files, and one-line complaints."""

import json

import cv2
import numpy as np
import pytest

from jobs import cli
from segformer3d.weights import untrained_weights
from tests.jobs.job_parts import TINY


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.run(["evaluate", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(untrained_weights(TINY))
    return path


@pytest.fixture
def folder(tmp_path):
    """Four frames of noise, with classes; two of them with depth."""
    root = tmp_path / "frames"
    rng = np.random.default_rng(0)
    for name in ("images", "class_ids", "depth"):
        (root / name).mkdir(parents=True)
    for index in range(4):
        cv2.imwrite(str(root / f"images/{index}.png"), rng.integers(0, 256, (48, 80, 3), np.uint8))
        cv2.imwrite(str(root / f"class_ids/{index}.png"), rng.integers(0, 19, (48, 80), np.uint8))
    for index in range(2):
        metres = rng.uniform(1, 90, (48, 80)).astype(np.float32)
        np.save(root / f"depth/{index}.npy", metres)
    return root


def complaint(result):
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("segformer3d: ")]
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_tables_and_files(run, weights, folder, tmp_path):
    output = tmp_path / "out"
    code, out, _ = run(weights, f"folder:{folder}", "--short-side", 32, "--output", output)
    assert code == 0
    for word in ("4 frames, short side 32 px", "mean IoU", "motorcycle", "AbsRel", "RMSE log"):
        assert word in out
    fields = json.loads((output / "evaluation.json").read_text())
    assert fields["dataset"] == f"folder:{folder}"
    assert fields["classes"]["pixels"] == 4 * 48 * 80
    assert 0 < fields["depth"]["pixels"] < 2 * 48 * 80
    assert np.sum(fields["classes"]["counts"]) == 4 * 48 * 80
    assert cv2.imread(str(output / "confusion.png")) is not None


def test_json(run, weights, folder):
    options = ("--json", "--short-side", 32, "--limit", 2, "--depth-cap-m", 50)
    code, out, _ = run(weights, f"folder:{folder}", *options)
    fields = json.loads(out)
    assert (code, fields["num_frames"], fields["depth"]["max_m"]) == (0, 2, 50)
    assert set(fields["classes"]["iou"]) >= {"road", "bicycle"}
    assert fields["notes"] == []


def test_the_same_numbers_as_by_hand(run, weights, folder):
    from segformer3d.config import METRIC_DEPTH
    from segformer3d.draw import resize_depth
    from segformer3d.predictor import Predictor
    from segformer3d.weights import model_from_bytes

    _, out, _ = run(weights, f"folder:{folder}", "--json", "--short-side", 32)
    model, info = model_from_bytes(weights.read_bytes())
    predictor = Predictor(model, info, device="cpu")
    hits, errors = [], []
    for index in range(4):
        image = cv2.cvtColor(cv2.imread(str(folder / f"images/{index}.png")), cv2.COLOR_BGR2RGB)
        # 80 x 48 at a short side of 32 is 53.3 x 32, so 64 x 32: both sides shrink.
        small = cv2.resize(image, (64, 32), interpolation=cv2.INTER_AREA)
        said = predictor.predict(small[None], class_ids_size=(48, 80))
        ids = cv2.imread(str(folder / f"class_ids/{index}.png"), cv2.IMREAD_UNCHANGED)
        hits.append(said.class_ids[0] == ids)
        if index < 2:
            true = np.load(folder / f"depth/{index}.npy")
            guess = resize_depth(METRIC_DEPTH.decode(said.depth[0]), (80, 48))
            errors.append((np.abs(guess - true) / true)[true < 80])
    fields = json.loads(out)
    assert fields["classes"]["pixel_accuracy"] == pytest.approx(np.mean(hits))
    assert fields["depth"]["abs_rel"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)


def test_default_weights_and_scenes(run):
    code, out, _ = run("default", "scenes:?count=1", "--short-side", 32)
    assert code == 0
    assert out.startswith("1 frame, short side 32 px")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("none.safetensors", "scenes:?count=1"), "none.safetensors"),
        (("WEIGHTS", "camvid"), "data set camvid: no data set kind"),
        (("WEIGHTS", "kitti:/data"), "camvid, cityscapes, folder, origin"),
        (("WEIGHTS", "folder:/nowhere"), "/nowhere/images"),
        (("WEIGHTS", "folder:FOLDER?labels=coco"), "labels must be one of"),
        (("WEIGHTS", "job:/nowhere"), "/nowhere"),
        (("WEIGHTS", "job:FOLDER"), "no job here"),
        (("WEIGHTS", "scenes:?count=1", "--device", "abacus"), "no such device"),
        (("WEIGHTS", "scenes:?count=1", "--limit", "0"), "--limit"),
        (("WEIGHTS", "scenes:?count=1", "--short-side", "8"), "--short-side"),
        (("WEIGHTS", "scenes:?count=1", "--depth-cap-m", "0"), "--depth-cap-m"),
        (("WEIGHTS", "scenes:?count=1", "--depth-cap-m", "nan"), "--depth-cap-m nan"),
        (("WEIGHTS", "scenes:?count=1", "--output", "~nobody-of-this-name/x"), "no such user"),
        (("WEIGHTS", "scenes:?count=1", "--output", "WEIGHTS"), "--output"),
    ],
)
def test_the_users_mistakes(run, weights, folder, arguments, expected):
    places = {"WEIGHTS": str(weights), "FOLDER": str(folder)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    assert expected in complaint(run(*arguments))


def test_a_hostile_frame_is_named(run, weights, folder):
    (folder / "class_ids/2.png").write_bytes(b"")
    result = run(weights, f"folder:{folder}", "--short-side", 32)
    assert str(folder / "class_ids/2.png") in complaint(result)


def test_output_without_matplotlib(run, weights, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = run(weights, f"folder:{folder}", "--output", tmp_path / "out")
    assert "segformer3d[train]" in complaint(result)
