"""Files with names that were made to hurt, from the plan to the PNG tree."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.planner import Planner
from jobs.spec import check_spec
from jobs.status import job_status
from jobs.verify import verify_job
from pipeline.decode import decode_shard
from pipeline.geometry import resize
from pipeline.layout import Generation, png_stem
from pipeline.sinks.parquet import frame_id
from pipeline.storage import StorageOptions, unescape_path
from tests.jobs.job_parts import finish_job, make_job
from tests.media import encode_image, picture, write_video

GENERATION = Generation()
NAMES = [
    b"caf\xe9.png",
    b"\xff\xfe\x80.png",
    b"new\nline.png",
    b"tab\t\r\x1b[31m\x7f.png",
    b"'single' \"double\".png",
    b"<script>alert(1)</script>.png".replace(b"/", b"\xe2\x88\x95"),
    b"a...png",
    b"a%2F..%2F..%2Fetc%2Fpasswd.png",
    b"%00%2e%2e.png",
    b"a\\..\\..\\up.png",
    b"-rf *.png",
    b"$(reboot);`reboot`|&.png",
    b"{curly}[square]?*#fragment.png",
    b" leading and trailing .png",
    b"s3::http:name.png",
    "\u202egnp.exe\u2066 \u0000".replace("\u0000", "").encode() + b".png",
    ("e\u0301" * 20).encode() + b".png",
    b"x" * 251 + b".png",
]
# The last two are called like PNGs that a job makes.
FOLDERS = [b"a..", b"a b\n\xe9", b"%2e%2e", b"a...png_depth.png", b"%00%2e%2e.png_color.png"]
# Dot files are no part of an archive.
HIDDEN = [b"...png", b"..\\up.png", b"..hidden/deep.png"]


def write_archive(folder: Path) -> dict[bytes, np.ndarray]:
    """An image under every name, some in hostile folders; their pixels by name."""
    folder.mkdir()
    pixels = {}
    for seed, name in enumerate([*NAMES, *(part + b"/deep.png" for part in FOLDERS), *HIDDEN]):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_image(picture(seed=seed), "PNG"))
        if name not in HIDDEN:
            pixels[name] = picture(seed=seed)
    return pixels


@pytest.fixture
def job(tmp_path):
    pixels = write_archive(tmp_path / "archive")
    write_video(tmp_path / "v.mp4", num_frames=3)
    (tmp_path / "v.mp4").rename(tmp_path / "archive" / "<video>'\n.mp4")
    made = make_job(tmp_path, bad=False, num_images=0)
    return made, pixels


def outside(folder: Path) -> list[Path]:
    """Everything that is not in the job's folder."""
    return sorted(path for path in folder.rglob("*") if not path.is_relative_to(folder / "job"))


def raw(asset: str) -> bytes:
    return os.fsencode(unescape_path(asset))


def test_hostile_names_go_the_whole_way(job, tmp_path):
    made, pixels = job
    before = sorted(
        path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "job")
    )
    assets = {part.asset for shard in made.shards for part in shard.slices}
    assert {raw(asset) for asset in assets} >= pixels.keys()
    seen = 0
    for shard in made.shards:
        decoded = decode_shard(shard)
        assert all(frame.error_kind is None for frame in decoded.frames)
        for frame, got in zip(decoded.frames, decoded.pixels, strict=True):
            assert frame.asset.isprintable() or not frame.asset.isascii()
            assert not any(char < " " or char == "\x7f" for char in frame.asset)
            if raw(frame.asset) in pixels:
                size = got.shape[1], got.shape[0]
                assert np.array_equal(got, resize(pixels[raw(frame.asset)], size))
                seen += 1
    assert seen == len(pixels)

    made.publish(range(made.plan.num_shards))
    finish_job(made)
    found = verify_job(made.store.url, StorageOptions())
    assert found.faults == []
    assert found.is_complete
    assert job_status(made.store.url, StorageOptions()).num_ok == len(pixels) + 3

    rows = [
        row
        for item in made.store.list(GENERATION.data_prefix)
        for row in pq.read_table(
            pa.BufferReader(made.store.read(item.key)), columns=["frame_id", "asset", "frame_index"]
        ).to_pylist()
    ]
    assert {row["asset"] for row in rows} == assets
    assert all(row["frame_id"] == frame_id(row["asset"], row["frame_index"]) for row in rows)

    root = (tmp_path / "job" / "png").resolve()
    for row in rows:
        stem = png_stem(row["asset"], row["frame_index"], is_video=row["asset"].endswith(".mp4"))
        path = (tmp_path / "job" / f"{stem}_depth.png").resolve()
        assert path.is_relative_to(root)
        assert path.is_file()
    after = sorted(
        path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "job")
    )
    assert after == before


def test_a_folder_whose_name_is_hostile_is_an_archive(tmp_path):
    folder = tmp_path / "<b>'\n\"%2e%2e"
    pixels = write_archive(folder)
    spec = check_spec(
        {"input": {"url": str(folder)}, "output": {"url": str(tmp_path / "job")}}, "the job"
    )
    shards = list(Planner(spec).shards())
    assert sum(shard.num_frames for shard in shards) == len(pixels)
    assert all(part.error_kind is None for shard in shards for part in shard.slices)
