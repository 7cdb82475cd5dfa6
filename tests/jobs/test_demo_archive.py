import subprocess
import sys
from itertools import pairwise

import av
import cv2
import pytest

from jobs import demo_archive
from jobs.demo_archive import make_demo_archive

SMALL = {"num_clips": 2, "frames_per_clip": 14, "num_images": 2, "size": (96, 64)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive")
    return root, make_demo_archive(root, **SMALL)


def files_below(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_archive_holds_what_it_returns_and_nothing_else(archive):
    root, paths = archive
    assert paths == files_below(root)
    assert [path.relative_to(root).as_posix() for path in paths] == [
        "clips/drive-00.mp4",
        "clips/drive-01.mkv",
        "stills/still-000.jpg",
        "stills/still-001.jpg",
    ]


def test_clips_are_h264_with_reordered_frames_and_regular_keyframes(archive):
    _, paths = archive
    for path in paths[:2]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == 12
            packets = [packet for packet in container.demux(stream) if packet.pts is not None]
            assert any(second.pts < first.pts for first, second in pairwise(packets))
            container.seek(0)
            frames = list(container.decode(stream))
        assert len(frames) == 14
        assert (frames[0].width, frames[0].height) == (96, 64)
        assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 12]
        assert [round(float(frame.time) * 12) for frame in frames] == list(range(14))


def test_stills_are_jpegs_of_the_size(archive):
    _, paths = archive
    for path in paths[2:]:
        assert cv2.imread(str(path)).shape == (64, 96, 3)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(archive, tmp_path):
    _, paths = archive
    again = make_demo_archive(tmp_path / "again", **SMALL)
    other = make_demo_archive(tmp_path / "other", seed=7, **SMALL)
    for path, same, different in zip(paths, again, other, strict=True):
        assert path.read_bytes() == same.read_bytes()
        assert path.read_bytes() != different.read_bytes()


def test_complete_files_are_kept_and_missing_ones_added(tmp_path):
    paths = make_demo_archive(tmp_path, num_clips=0, num_images=2, size=(32, 32))
    paths[0].unlink()
    before = paths[1].stat().st_mtime_ns
    paths[1].write_bytes(b"kept")
    assert make_demo_archive(tmp_path, num_clips=0, num_images=2, size=(32, 32)) == paths
    assert paths[1].read_bytes() == b"kept"
    assert paths[1].stat().st_mtime_ns >= before
    assert paths[0].stat().st_size > 0


@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace"])
def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch, failing):
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    owner = demo_archive.os if failing == "fsync" else demo_archive.Path
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        make_demo_archive(tmp_path, num_clips=0, num_images=1, size=(32, 32))
    assert files_below(tmp_path) == []


def test_a_run_killed_while_encoding_leaves_no_file_and_can_be_repeated(tmp_path):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from jobs import demo_archive\n"
        "real, calls = demo_archive.render, []\n"
        "def render(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5: os._exit(9)\n"
        "    return real(*args)\n"
        "demo_archive.render = render\n"
        "demo_archive.make_demo_archive(Path(sys.argv[1]), num_clips=1, size=(32, 32))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == 9
    assert files_below(tmp_path) == []
    paths = make_demo_archive(tmp_path, num_clips=1, frames_per_clip=2, num_images=0, size=(32, 32))
    assert files_below(tmp_path) == paths


@pytest.mark.parametrize(
    "wrong", [{"size": (33, 32)}, {"size": (0, 0)}, {"frames_per_clip": 0}, {"num_clips": -1}]
)
def test_impossible_archives_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be"):
        make_demo_archive(tmp_path, **wrong)
