"""The verb `predict`, in process, on real files."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from jobs import cli, footage
from jobs.picture_files import VideoWriter, output_paths
from jobs.predict import panel_size
from pipeline.decode import DecodeLimits, decode_shard
from pipeline.errors import InputError, UserError
from pipeline.records import ShardSpec
from pipeline.sinks.parquet import encode_shard, read_rows
from pipeline.sources.listing import list_assets
from pipeline.sources.slicing import slice_asset
from pipeline.stages import AnnotateShard, StageContext
from pipeline.storage import StorageOptions, open_store
from segformer3d.config import METRIC_DEPTH, ModelConfig, WeightsInfo
from segformer3d.labels import CLASSES
from segformer3d.model import build_model
from segformer3d.weights import save_weights, untrained_weights
from tests.media import damage, encode_cv2, encode_image, packet_places, picture, write_video
from tests.web_server import serve

TINY = "mit:16,32,80,128:1,1,1,1"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    path.write_bytes(untrained_weights(TINY))
    return path


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, weights):
    """Call the verb in an empty working folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments, verb="predict"):
        options = ["--weights", weights, "--short-side", 64, "--device", "cpu"]
        code = cli.run([verb, *map(str, [*options, *arguments])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def read_png(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def read_video(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        return {
            "pts_s": [float(frame.pts * stream.time_base) for frame in frames],
            "pixels": [frame.to_ndarray(format="rgb24") for frame in frames],
            "rate": stream.average_rate,
            "duration_s": container.duration / av.time_base,
        }


def mean_difference(left, right):
    return np.abs(left.astype(int) - right.astype(int)).mean()


def test_an_image_gives_three_panels_of_its_own_size(run, tmp_path):
    pixels = picture(192, 128)
    (tmp_path / "street.png").write_bytes(encode_cv2(pixels, ".png"))
    code, out, err = run(tmp_path / "street.png")
    assert (code, out) == (0, "street_panels.png\n")
    assert "untrained" in err
    panels = read_png("street_panels.png")
    assert panels.shape[1] == 3 * 192
    assert panels.shape[0] > 128
    assert (panels[:128, :192] == pixels).all()
    assert mean_difference(panels[:128, 192:384], pixels) > 5
    assert not list(tmp_path.glob("work/.*"))


def job_of(folder, weights):
    """What a job's own decoding and annotating stages make of the only file of a folder."""
    from pipeline.decode import probe_asset
    from pipeline.geometry import Geometry, input_size

    (asset,) = list_assets(open_store(str(folder))).assets
    probe = probe_asset(str(folder), asset)
    (part,) = slice_asset(probe)
    size = input_size(part.width, part.height, Geometry(short_side_px=64))
    shard = ShardSpec(
        shard_id=0,
        root=str(folder),
        input_width_px=size[0],
        input_height_px=size[1],
        slices=(part,),
    )
    context = StageContext(
        job_url="unused",
        job_storage=StorageOptions(),
        archive_storage=StorageOptions(),
        generation=0,
        plan_id="",
        lease=1,
        metadata={},
        limits=DecodeLimits(),
        threads=None,
    )
    return AnnotateShard(context, weights.read_bytes()).annotate(decode_shard(shard))


@pytest.mark.parametrize("name", ["turned.jpg", "turned.mp4"])
def test_class_ids_and_numbers_are_those_of_a_job(run, tmp_path, weights, monkeypatch, name):
    from segformer3d.predictor import Predictor

    archive = tmp_path / "archive"
    archive.mkdir()
    if name.endswith("jpg"):
        (archive / name).write_bytes(encode_image(picture(160, 96), "JPEG", orientation=6))
    else:
        write_video(archive / name, num_frames=9, size=(160, 96), rotation_deg=90)
    job = job_of(archive, weights)
    seen, real = [], Predictor.predict

    def watched(self, frames, **options):
        said = real(self, frames, **options)
        seen.append(said)
        return said

    monkeypatch.setattr(Predictor, "predict", watched)
    code, out, _ = run(archive / name, "--json")
    assert code == 0
    assert (np.concatenate([said.class_ids for said in seen]) == np.stack(job.class_ids)).all()
    assert (np.concatenate([said.depth for said in seen]) == np.stack(job.depth)).all()
    (report,) = json.loads(out)
    frames = report.get("frames", [report])
    assert len(frames) == len(job.frames)
    for frame, row, record in zip(
        frames, read_rows(encode_shard(job, {})), job.frames, strict=True
    ):
        fractions = list(frame["class_fraction"].values())
        assert fractions == pytest.approx(row["class_fraction"])
        assert frame["depth_p50_m"] == pytest.approx(row["depth_p50_m"])
        assert frame["confidence_mean"] == pytest.approx(row["confidence_mean"])
        assert frame.get("pts_s") == record.pts_s
    assert (report["width"], report["height"]) == (96, 160)


def test_exif_orientation_turns_the_frame(run, tmp_path):
    pixels = picture(160, 96)
    (tmp_path / "turned.png").write_bytes(encode_image(pixels, "PNG", orientation=6))
    assert run(tmp_path / "turned.png")[0] == 0
    assert (read_png("turned_panels.png")[:160, :96] == np.rot90(pixels, -1)).all()


def test_the_numbers_of_an_image(run, tmp_path):
    (tmp_path / "a.png").write_bytes(encode_cv2(picture(), ".png"))
    code, out, _ = run(tmp_path / "a.png", "--json")
    (report,) = json.loads(out)
    assert code == 0
    assert list(report["class_fraction"]) == [item.name for item in CLASSES]
    assert sum(report["class_fraction"].values()) == pytest.approx(1)
    assert 0 < report["depth_p05_m"] <= report["depth_p50_m"] <= report["depth_p95_m"]
    assert 0 < report["confidence_mean"] <= 1
    assert 0 <= report["entropy_mean"] <= np.log(19) + 1e-6
    assert report["file"] == "a.png"
    assert report["output"] == "a_panels.png"
    assert (report["error"], report["num_frames"], report["num_errors"]) == (None, 1, 0)
    assert "frames" not in report


@pytest.mark.parametrize(("num_classes", "has_depth", "panel"), [(None, True, 1), (19, False, 2)])
def test_a_head_that_is_lacking_gives_a_grey_panel_and_null(
    run, tmp_path, num_classes, has_depth, panel
):
    config = ModelConfig(variant=TINY, head_width=16, num_classes=num_classes, has_depth=has_depth)
    info = WeightsInfo(
        config=config, depth_codec=METRIC_DEPTH if has_depth else None, training_data="none"
    )
    save_weights(tmp_path / "one.safetensors", build_model(config), info)
    (tmp_path / "a.png").write_bytes(encode_cv2(picture(192, 128), ".png"))
    code, out, err = run(tmp_path / "a.png", "--json", "--weights", tmp_path / "one.safetensors")
    (report,) = json.loads(out)
    assert (code, err) == (0, "")
    missing = {1: ("class_fraction", "confidence_mean"), 2: ("depth_p05_m", "depth_p50_m")}[panel]
    assert [report[name] for name in missing] == [None, None]
    grey = read_png("a_panels.png")[:128, panel * 192 : (panel + 1) * 192]
    assert (grey == grey[0, 0]).mean() > 0.9


@pytest.mark.parametrize("num_frames", [1, 2, 25])
@pytest.mark.parametrize("ticks_per_second", [25, 30000])
def test_a_video_keeps_every_frame_its_rate_and_its_length(
    run, tmp_path, num_frames, ticks_per_second
):
    step = {25: 1, 30000: 1001}[ticks_per_second]
    source = write_video(
        tmp_path / "drive.mp4",
        num_frames=num_frames,
        ticks=[step * index for index in range(num_frames)],
        ticks_per_second=ticks_per_second,
    )
    code, out, _ = run(source)
    assert (code, out) == (0, "drive_panels.mp4\n")
    before, after = read_video(source), read_video("drive_panels.mp4")
    assert after["pts_s"] == pytest.approx(before["pts_s"], abs=1e-4)
    assert len(after["pixels"]) == num_frames
    if num_frames > 1:
        assert after["rate"] == Fraction(ticks_per_second, step)
        span = num_frames * step / ticks_per_second
        assert after["duration_s"] == pytest.approx(span, abs=2e-3)
    for left, right in zip(before["pixels"], after["pixels"], strict=True):
        assert mean_difference(left, right[:64, :96]) < 4


def test_a_variable_frame_rate_keeps_its_times(run, tmp_path):
    ticks = [0, 33, 50, 200, 201, 900, 1500]
    source = write_video(
        tmp_path / "drive.mp4", num_frames=7, ticks=ticks, ticks_per_second=1000, b_frames=0
    )
    code, out, _ = run(source, "--json")
    (report,) = json.loads(out)
    assert code == 0
    after = read_video("drive_panels.mp4")
    assert after["pts_s"] == pytest.approx([tick / 1000 for tick in ticks], abs=1e-6)
    assert [frame["pts_s"] for frame in report["frames"]] == after["pts_s"]
    assert after["duration_s"] == pytest.approx(1.5 + 1.5 / 6, abs=2e-3)


def test_a_video_that_starts_late_starts_at_zero(run, tmp_path):
    source = write_video(tmp_path / "late.mkv", num_frames=5, ticks=range(90, 95))
    assert run(source)[0] == 0
    after = read_video("late_panels.mp4")
    assert after["pts_s"] == pytest.approx([index / 30 for index in range(5)], abs=2e-3)


@pytest.mark.parametrize("rotation_deg", [90, 180, 270])
def test_a_rotated_video_is_upright(run, tmp_path, rotation_deg):
    source = write_video(
        tmp_path / "turned.mp4", num_frames=4, size=(160, 96), rotation_deg=rotation_deg
    )
    assert run(source)[0] == 0
    before, after = read_video(source), read_video("turned_panels.mp4")
    for left, right in zip(before["pixels"], after["pixels"], strict=True):
        upright = np.rot90(left, rotation_deg // 90)
        height, width = upright.shape[:2]
        assert right.shape[1] == 3 * width
        assert mean_difference(upright, right[:height, :width]) < 4


def test_a_damaged_frame_keeps_its_place(run, tmp_path):
    source = write_video(tmp_path / "drive.mp4", num_frames=30, gop=10, b_frames=0)
    places = sorted(packet_places(source))
    damage(source, places[14][1] + 4, places[14][2] - 4)
    code, out, err = run(source, "--json")
    (report,) = json.loads(out)
    assert code == 3
    bad = [frame["frame_index"] for frame in report["frames"] if frame["error_kind"]]
    assert bad == list(range(14, 20))
    assert report["num_errors"] == 6
    assert report["frames"][14]["class_fraction"] is None
    assert len(read_video("drive_panels.mp4")["pixels"]) == 30
    assert [line for line in err.splitlines() if "6 of 30 frames" in line]


def test_a_folder_goes_on_after_a_broken_file(run, tmp_path):
    archive = tmp_path / "archive"
    (archive / "sub").mkdir(parents=True)
    (archive / "a.png").write_bytes(encode_cv2(picture(), ".png"))
    (archive / "a.jpg").write_bytes(encode_cv2(picture(seed=1), ".jpg"))
    (archive / "sub" / "b.jpg").write_bytes(encode_cv2(picture(seed=2), ".jpg"))
    (archive / "broken.jpg").write_bytes(encode_cv2(picture(), ".jpg")[:300])
    (archive / "broken.mp4").write_bytes(b"no video")
    (archive / "notes.txt").write_text("x")
    write_video(archive / "sub" / "b.mp4", num_frames=3)
    code, out, err = run(archive)
    assert code == 3
    assert out.split() == [
        "archive_panels/a.jpg_panels.png",
        "archive_panels/a.png_panels.png",
        "archive_panels/sub/b_panels.png",
        "archive_panels/sub/b_panels.mp4",
    ]
    made = {str(path) for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert made == {str(tmp_path / "work" / line) for line in out.split()}
    assert (
        len([line for line in err.splitlines() if line.startswith("broken.jpg: truncated: ")]) == 1
    )
    assert len([line for line in err.splitlines() if line.startswith("broken.mp4: corrupt: ")]) == 1
    assert "Traceback" not in err


def test_pictures_below_the_input_are_not_drawn_again(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work" / "a.png").write_bytes(encode_cv2(picture(), ".png"))
    monkeypatch.chdir(tmp_path / "work")
    first, second = run("."), run(".")
    assert first[:2] == second[:2] == (0, "work_panels/a_panels.png\n")


def test_a_glob_names_some_files(run, tmp_path):
    for name in ("a1.png", "a2.png", "b.png"):
        (tmp_path / name).write_bytes(encode_cv2(picture(), ".png"))
    code, out, _ = run(tmp_path / "a*.png", "--output", "out")
    assert (code, out.split()) == (0, ["out/a1_panels.png", "out/a2_panels.png"])


@pytest.mark.parametrize(
    ("output", "expected"),
    [("out", "out/a_panels.png"), ("new/x.png", "new/x.png"), (".", "a_panels.png")],
)
def test_the_output_is_a_folder_or_a_file(run, tmp_path, output, expected):
    (tmp_path / "a.jpg").write_bytes(encode_cv2(picture(), ".jpg"))
    code, out, _ = run(tmp_path / "a.jpg", "--output", output)
    assert (code, out) == (0, f"{expected}\n")
    assert (tmp_path / "work" / expected).exists()


def test_a_file_without_an_extension_is_read_for_what_it_is(run, tmp_path):
    (tmp_path / "photo").write_bytes(encode_cv2(picture(), ".png"))
    write_video(tmp_path / "film.mp4", num_frames=2).rename(tmp_path / "film")
    assert run(tmp_path / "photo")[:2] == (0, "photo_panels.png\n")
    assert run(tmp_path / "film")[:2] == (0, "film_panels.mp4\n")


@pytest.fixture
def web(monkeypatch):
    """A web server on loopback, which fetching is allowed from; its URL, and what it holds."""
    monkeypatch.setenv("SEGFORMER3D_ALLOW_PRIVATE_HTTP", "1")
    with serve() as server:
        yield server


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_a_file_on_the_web(run, tmp_path, web, name):
    if name.endswith("png"):
        data = encode_cv2(picture(), ".png")
    else:
        data = write_video(tmp_path / name, num_frames=3).read_bytes()
    web.files[f"/street/{name}"] = data
    code, out, _ = run(f"{web.url}/street/{name}?signature=x")
    assert (code, out) == (0, f"a_panels.{name[2:]}\n")


def test_a_download_is_bounded(run, web, monkeypatch):
    web.files["/big.mp4"] = bytes(3 << 20)
    monkeypatch.setattr(footage, "MAX_DOWNLOAD_BYTES", 2 << 20)
    code, out, err = run(f"{web.url}/big.mp4")
    assert (code, out) == (3, "")
    assert "big.mp4: too_large: " in err


def test_s3_names_files_and_folders(run, s3_bucket_url):
    store = open_store(s3_bucket_url)
    store.put("in/a.png", encode_cv2(picture(), ".png"))
    assert run(f"{s3_bucket_url}/in/a.png")[:2] == (0, "a_panels.png\n")
    assert run(f"{s3_bucket_url}/in")[:2] == (0, "in_panels/a_panels.png\n")


def test_a_broken_image_is_quarantined(run, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image at all")
    code, out, err = run(tmp_path / "a.jpg", "--json")
    (report,) = json.loads(out)
    assert code == 3
    assert (report["error_kind"], report["output"], report["class_fraction"]) == (
        "corrupt",
        None,
        None,
    )
    assert "a.jpg: corrupt: " in err
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.jpg"], "none.jpg: no such file or folder"),
        (["EMPTY"], "no image or video here"),
        (["memory://street/none.jpg"], "unsupported storage scheme 'memory'"),
        (["http://127.0.0.1:9/none.jpg"], "no public address"),
        (["IMAGE", "--short-side", "33"], "geometry.short_side_px"),
        (["IMAGE", "--device", "abacus"], "no such device"),
        (["IMAGE", "--device", "meta"], "no such device"),
        (["IMAGE", "--weights", "none.safetensors"], "weights"),
        (["IMAGE", "--weights", "IMAGE"], "weights"),
        (["IMAGE", "--output", "x.jpg"], "a .png file"),
        (["IMAGE", "--output", "s3://out/x"], "local folder"),
        (["IMAGE", "--output", "IMAGE"], "this is the input"),
        (["URL", "--output", "IMAGE"], "this is the input"),
        (["IMAGE", "--output", "~nobody-of-this-name/x"], "no such user"),
        (["IMAGE", "--output", "x" * 300 + ".png"], "File name too long"),
        (["LOOP"], "no such file or folder"),
        (["FOLDER", "--output", "FOLDER"], "this is the input"),
        ([], "Missing argument"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(run, tmp_path, arguments, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    image = tmp_path / "folder" / "a b.png"
    image.write_bytes(encode_cv2(picture(), ".png"))
    (tmp_path / "loop.png").symlink_to("loop.png")
    words = {
        "EMPTY": tmp_path / "empty",
        "FOLDER": tmp_path / "folder",
        "IMAGE": image,
        "LOOP": tmp_path / "loop.png",
        "URL": image.as_uri(),
    }
    code, out, err = run(*[words.get(word, word) for word in arguments])
    lines = [line for line in err.splitlines() if line.startswith("segformer3d: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert expected in lines[0]
    assert "Traceback" not in err
    assert image.read_bytes() == encode_cv2(picture(), ".png")


def test_an_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / "a.png").write_bytes(encode_cv2(picture(), ".png"))
    (tmp_path / "work" / "file").write_text("x")
    (tmp_path / "work" / "out.png").mkdir()
    (tmp_path / "work" / "out.png" / "a_panels.png").mkdir()
    code, _, err = run(tmp_path / "a.png", "--output", "file/out.png")
    assert (code, "cannot make the folder file" in err) == (2, True)
    code, _, err = run(tmp_path / "a.png", "--output", "out.png")
    assert (code, "a_panels.png: cannot be written" in err) == (1, True)
    code, _, err = run(tmp_path / "a.png", "--output", "/proc/x.png")
    assert (code, "/proc/x.png cannot be made: " in err) == (2, True)
    assert not list((tmp_path / "work").rglob(".*"))


def test_names_that_would_be_too_long_are_cut_and_told_apart(run, tmp_path):
    (tmp_path / "in").mkdir()
    stems = ["n" * 247 + "1", "n" * 247 + "2", "\N{LATIN SMALL LETTER E WITH ACUTE}" * 120]
    for stem in stems:
        (tmp_path / "in" / f"{stem}.png").write_bytes(encode_cv2(picture(), ".png"))
    code, out, _ = run(tmp_path / "in", "--output", "out")
    paths = [Path(line) for line in out.splitlines()]
    assert (code, len(set(paths))) == (0, 3)
    for path, stem in zip(paths, stems, strict=True):
        assert path.is_file()
        assert path.name.endswith("_panels.png")
        assert path.name[:100] == stem[:100]
    assert run(tmp_path / "in" / f"{stems[0]}.png")[0] == 0


def test_no_two_files_share_a_picture(run, tmp_path):
    for name in ("a.jpg", "a.png", "a.jpg.png"):
        (tmp_path / name).write_bytes(encode_cv2(picture(), name[-4:]))
    code, out, _ = run(tmp_path, "--output", "out")
    assert code == 0
    expected = {f"out/{name}_panels.png" for name in ("a.jpg", "a.jpg.png", "a.png")}
    assert set(out.split()) == expected


def test_names_are_escaped_as_in_a_job(run, tmp_path):
    (tmp_path / "in").mkdir()
    for name in (b"caf\xe9.png", b"new\nline.png"):
        path = tmp_path / "in" / os.fsdecode(name)
        path.write_bytes(encode_cv2(picture(), ".png"))
    code, out, _ = run(tmp_path / "in", "--output", "out")
    assert (code, out) == (0, "out/caf%E9_panels.png\nout/new%0Aline_panels.png\n")


@pytest.mark.parametrize("key", ["/etc/a.png", "//etc/a.png", "a//b.png"])
def test_no_key_of_s3_leads_out_of_the_folder(key):
    class Bucket:
        url = "s3://bucket/drives"

    found = footage.Found(files=(footage._stored_file(Bucket(), key, "image"),), is_file=False)
    (path,) = output_paths(found, Bucket.url, "out", "panels")
    assert path.parts[0] == "out"
    assert "%2F" in str(path)


def test_frames_that_are_far_apart(run, tmp_path):
    pts = [0, 3000 * 100]
    with VideoWriter(tmp_path / "lapse.mp4", (64, 48), pts, Fraction(1, 100)) as writer:
        for _ in pts:
            writer.write(picture(64, 48))
    assert run(tmp_path / "lapse.mp4")[0] == 0
    assert read_video("lapse_panels.mp4")["pts_s"] == [0, 3000]
    with pytest.raises(InputError, match="23861 s apart"):
        VideoWriter(tmp_path / "far.mp4", (64, 48), [0, 2**31 - 1], Fraction(1, 90000))


def test_a_video_says_how_its_colours_are_meant(tmp_path):
    # Road, vegetation, sky, person: 601 and 709 differ most in saturated colours.
    colours = np.array([[128, 64, 128], [107, 142, 35], [70, 130, 180], [220, 20, 60]], np.uint8)
    pixels = np.repeat(np.repeat(colours[None], 64, axis=0), 32, axis=1)
    with VideoWriter(tmp_path / "c.mp4", (128, 64), [0, 1], Fraction(1, 25)) as writer:
        for _ in range(2):
            writer.write(pixels)
    with av.open(str(tmp_path / "c.mp4")) as container:
        frame = next(container.decode(video=0))
    assert frame.colorspace == Colorspace.ITU601
    assert (frame.color_primaries, frame.color_trc) == (1, 1)
    assert frame.color_range == ColorRange.MPEG
    seen = frame.to_ndarray(format="rgb24").astype(int)
    inside = [seen[16:48, 32 * index + 8 : 32 * index + 24] for index in range(len(colours))]
    for block, colour in zip(inside, colours, strict=True):
        assert np.abs(block - colour).max() <= 5


@pytest.mark.parametrize("verb", ["predict", "attention"])
@pytest.mark.parametrize("kind", ["python", "gpu", "cpu"])
def test_memory_that_runs_out_is_the_file_s_error(run, tmp_path, monkeypatch, verb, kind):
    import torch

    def full(*_args, **_options):
        if kind == "cpu":
            torch.empty(2**60, dtype=torch.uint8)
        raise MemoryError if kind == "python" else torch.OutOfMemoryError

    (tmp_path / "a.png").write_bytes(encode_cv2(picture(96, 64), ".png"))
    monkeypatch.setattr("segformer3d.predictor.Predictor.predict", full)
    code, _, err = run(tmp_path / "a.png", verb=verb)
    assert code == 3
    assert "a.png: out_of_memory: the model does not fit into memory with frames of 96x64" in err


def test_frames_that_are_too_long_are_the_file_s_error(run, tmp_path):
    (tmp_path / "a.png").write_bytes(encode_cv2(picture(900, 64), ".png"))
    code, _, err = run(tmp_path / "a.png")
    assert code == 3
    assert "a.png: too_large: " in err


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((960, 540), (960, 540)),
        ((321, 181), (320, 180)),
        ((4000, 2000), (1280, 640)),
        ((1, 1), (2, 2)),
    ],
)
def test_panels_are_even_and_not_too_large(size, expected):
    assert panel_size(*size) == expected


def test_a_skipped_folder_must_not_be_the_input(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="this is the input"):
        footage.find_files(str(tmp_path), StorageOptions(), skip=tmp_path)


def test_the_command_line_starts_without_the_heavy_libraries():
    program = "import sys, jobs.cli; print({'torch', 'cv2', 'ray', 'av'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "set()\n"
