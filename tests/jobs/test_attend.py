"""The verb `attention`, in process, on real files."""

import av
import cv2
import numpy as np
import pytest

from jobs import cli
from segformer3d.weights import untrained_weights
from tests.media import damage, encode_cv2, encode_image, packet_places, picture, write_video

TINY = "mit:16,32,80,128:1,1,1,1"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Call the verb in an empty working folder."""
    (tmp_path / "tiny.safetensors").write_bytes(untrained_weights(TINY))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments):
        options = ["--weights", tmp_path / "tiny.safetensors", "--short-side", 64]
        code = cli.run(["attention", *map(str, [*options, "--device", "cpu", *arguments])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def grid(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def test_an_image_gives_a_grid_per_mode(run, tmp_path):
    (tmp_path / "a.png").write_bytes(encode_cv2(picture(192, 128), ".png"))
    assert run(tmp_path / "a.png")[:2] == (0, "a_attention.png\n")
    assert run(tmp_path / "a.png", "--mode", "mean")[:2] == (0, "a_attention_mean.png\n")
    at, mean = grid("a_attention.png"), grid("a_attention_mean.png")
    assert at.shape == mean.shape
    assert at.shape[1] == 4 * (192 + 4)
    assert (at != mean).any()


def test_a_place_that_not_every_file_has(run, tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in {"a": (192, 128), "b": (96, 64), "c": (192, 128)}.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(encode_cv2(picture(*size), ".png"))
    code, out, err = run(tmp_path / "in", "--at", "150,100")
    assert (code, out.split()) == (
        3,
        ["in_attention/a_attention.png", "in_attention/c_attention.png"],
    )
    assert "b.png: unsupported: --at 150,100: outside the frame, which is 96x64" in err


def test_the_query_moves_its_mark_in_the_upright_frame(run, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode_image(picture(192, 128), "JPEG", orientation=6))
    run(tmp_path / "a.jpg", "--at", "20,150", "--output", "corner.png")
    run(tmp_path / "a.jpg", "--at", "100,30", "--output", "other.png")
    tile = slice(None), slice(0, 128)
    corner, other = grid("corner.png")[tile].astype(int), grid("other.png")[tile].astype(int)
    label_px = (len(grid("corner.png")) - 4 * (192 + 4)) // 8
    marks = np.abs(corner - other).sum(-1)[label_px : label_px + 192] > 250
    rows, columns = np.nonzero(marks)
    assert (rows.min(), columns.min()) == (pytest.approx(30, abs=10), pytest.approx(20, abs=10))
    assert (rows.max(), columns.max()) == (pytest.approx(150, abs=10), pytest.approx(100, abs=10))


def test_a_video_gives_a_video_with_every_frame(run, tmp_path):
    source = write_video(tmp_path / "drive.mp4", num_frames=7, rotation_deg=90)
    assert run(source, "--mode", "mean")[:2] == (0, "drive_attention_mean.mp4\n")
    with av.open("drive_attention_mean.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 30)
        assert len(list(container.decode(stream))) == 7


def test_a_damaged_video_is_drawn_as_far_as_it_goes(run, tmp_path):
    source = write_video(tmp_path / "drive.mp4", num_frames=6, gop=3, b_frames=0)
    places = sorted(packet_places(source))
    damage(source, places[3][1] + 4, places[3][2] - 4)
    code, out, err = run(source)
    assert (code, out) == (3, "drive_attention.mp4\n")
    assert "drive.mp4: corrupt: 3 of 6 frames" in err
    with av.open("drive_attention.mp4") as container:
        assert len(list(container.decode(video=0))) == 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.jpg"], "no such file or folder"),
        (["IMAGE", "--at", "middle"], "write --at X,Y"),
        (["IMAGE", "--at", "1,2,3"], "write --at X,Y"),
        (["IMAGE", "--at", "500,10"], "outside the frame, which is 96x64"),
        (["IMAGE", "--at", "nan,10"], "outside the frame"),
        (["IMAGE", "--at", "1,1", "--mode", "mean"], "drop one"),
        (["IMAGE", "--block", "2"], "stage 1 has no block 2"),
        (["IMAGE", "--mode", "every"], "--mode"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(run, tmp_path, arguments, expected):
    (tmp_path / "a.png").write_bytes(encode_cv2(picture(), ".png"))
    code, out, err = run(*[tmp_path / "a.png" if word == "IMAGE" else word for word in arguments])
    lines = [line for line in err.splitlines() if line.startswith("segformer3d: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert expected in lines[0]
    assert "Traceback" not in err
