"""The whole job over a mixed archive: local and S3 give the same, and every reader opens it."""

from contextlib import suppress
from itertools import pairwise

import cv2
import datasets
import duckdb
import numpy as np
import polars as pl
import psutil
import pyarrow.parquet as pq
import pytest

from jobs.cluster import connect
from jobs.demo import run_demo
from jobs.planner import Planner
from jobs.spec import RaySection, check_spec
from pipeline.encode import decode_class_ids, decode_depth
from pipeline.geometry import Geometry, input_size
from pipeline.sources.assets import DecodeLimits
from pipeline.storage import open_store
from segformer3d.weights import model_from_bytes, untrained_weights, weights_to_bytes
from tests.integration.jobs_under_test import JobUnderTest, make_weights, wait_for
from tests.media import encode_cv2, encode_image, picture, write_video

pytestmark = pytest.mark.ray

NUM_FRAMES = {"drive/a.mp4": 25, "drive/b.mkv": 20, "drive/c.mov": 15, "night/d.ts": 15}
STILLS = {"stills/one.jpg": (160, 96), "stills/two.png": (64, 200), "odd % ä/three.JPG": (96, 64)}
SETTINGS = ("geometry.short_side_px=64", "shard.frames=16", "output.png=true")
POISON = ("cv2.py", "numpy.py", "pipeline.py", "sitecustomize.py")
GEOMETRY = Geometry(short_side_px=64)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "archive"
    for folder in ("drive", "night", "stills", "odd % ä", "sub/.hidden"):
        (root / folder).mkdir(parents=True)
    write_video(root / "drive/a.mp4", num_frames=25, gop=8)
    write_video(root / "drive/b.mkv", num_frames=20, size=(128, 96), codec="libx265")
    write_video(root / "drive/c.mov", num_frames=15, rotation_deg=90)
    write_video(root / "night/d.ts", num_frames=15, gop=5, format="mpegts")
    for name, size in STILLS.items():
        (root / name).write_bytes(encode_cv2(picture(*size), f".{name[-3:].lower()}"))
    (root / "sub/.hidden/x.jpg").write_bytes(encode_image(picture(), "JPEG"))
    (root / "sub/readme.txt").write_text("no asset")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def local(archive, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    for name in POISON:
        (folder / name).write_text(f"open({str(folder / 'was-run')!r}, 'a').write({name!r})\n")
    job = JobUnderTest(
        archive=str(archive),
        url=str(folder / "job"),
        weights=weights,
        folder=folder / "logs",
        settings=SETTINGS,
        started_in=folder,
    )
    with job.nothing_left():
        driver = job.run()
        assert driver.end() == 0, driver.said
        job.wait_until_gone()
        yield job


def test_no_code_of_the_folder_where_it_is_started_runs(local):
    assert all((local.started_in / name).exists() for name in POISON)
    assert not (local.started_in / "was-run").exists()


def table(job):
    return pq.read_table(f"{job.url}/gen-0000/data").sort_by(
        [("asset", "ascending"), ("frame_index", "ascending")]
    )


def test_every_frame_of_every_asset_has_one_row(local):
    rows = table(local).select(["asset", "frame_index", "pts_s", "status"]).to_pylist()
    expected = {(asset, index) for asset, n in NUM_FRAMES.items() for index in range(n)}
    expected |= {(asset.replace("%", "%25"), 0) for asset in STILLS}
    assert sorted((row["asset"], row["frame_index"]) for row in rows) == sorted(expected)
    assert {row["status"] for row in rows} == {"ok"}
    for asset in NUM_FRAMES:
        pts_s = [row["pts_s"] for row in rows if row["asset"] == asset]
        assert all(later > earlier for earlier, later in pairwise(pts_s))
    assert all(row["pts_s"] is None for row in rows if row["asset"].startswith("stills"))


def test_sizes_in_parquet_are_the_design_s(local):
    for row in table(local).to_pylist():
        width, height = input_size(row["width"], row["height"], GEOMETRY)
        assert decode_class_ids(row["class_ids"]["bytes"]).shape == (height, width)
        assert decode_depth(row["depth"]["bytes"]).shape == (height // 4, width // 4)
        assert sum(row["class_fraction"]) == pytest.approx(1, abs=1e-5)
        assert 0 < row["confidence_mean"] <= 1
        assert 0 <= row["entropy_mean"] <= np.log(19) + 1e-6
        assert 0 < row["depth_p05_m"] <= row["depth_p50_m"] <= row["depth_p95_m"]
    rotated = table(local).filter(pl_asset("drive/c.mov")).to_pylist()[0]
    assert (rotated["width"], rotated["height"]) == (64, 96)


def pl_asset(name):
    import pyarrow.compute as pc

    return pc.field("asset") == name


def test_the_png_tree_mirrors_the_archive(local):
    store = open_store(local.url)
    for row in table(local).to_pylist():
        stem = f"png/{row['asset']}"
        if row["pts_s"] is not None:
            stem += f"/{row['frame_index']:06d}"
        for suffix, dtype, channels in (
            ("_labelTrainIds.png", np.uint8, ()),
            ("_color.png", np.uint8, (3,)),
            ("_depth.png", np.uint16, ()),
        ):
            data = np.frombuffer(store.read(stem + suffix), np.uint8)
            pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
            assert pixels.dtype == dtype
            assert pixels.shape == (row["height"], row["width"], *channels)
    assert len(local.pngs()) == 3 * (sum(NUM_FRAMES.values()) + len(STILLS))


def test_every_reader_opens_the_job(local, tmp_path):
    files = f"{local.url}/gen-0000/data/*.parquet"
    count = sum(NUM_FRAMES.values()) + len(STILLS)
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == count
    assert loaded[0]["class_ids"].mode == "L"
    assert loaded[0]["depth"].mode == "I;16"
    with duckdb.connect() as connection:
        query = f"select count(distinct frame_id) from '{files}' where status = 'ok'"
        assert connection.execute(query).fetchone() == (count,)
    assert pl.scan_parquet(files).select(pl.len()).collect().item() == count


def test_s3_gives_the_same(local, archive, weights, s3_bucket_url, tmp_path):
    store = open_store(f"{s3_bucket_url}/archive")
    for path in archive.rglob("*.*"):
        if path.is_file():
            store.put(path.relative_to(archive).as_posix(), path.read_bytes())
    job = JobUnderTest(
        archive=f"{s3_bucket_url}/archive",
        url=f"{s3_bucket_url}/job",
        weights=weights,
        folder=tmp_path,
        settings=SETTINGS,
    )
    with job.nothing_left():
        driver = job.run()
        assert driver.end() == 0, driver.said
        job.wait_until_gone()
    job.check_sound()
    assert job.rows() == local.rows()
    assert job.pngs() == local.pngs()


def test_class_ids_at_the_asset_s_size_and_a_lacking_head(archive, tmp_path):
    import dataclasses

    from segformer3d.model import build_model

    _, info = model_from_bytes(untrained_weights("mit:16,32,80,128:1,2,2,1"))
    config = dataclasses.replace(info.config, has_depth=False)
    bare = tmp_path / "bare.safetensors"
    info = dataclasses.replace(info, config=config, depth_codec=None)
    bare.write_bytes(weights_to_bytes(build_model(config), info))
    job = JobUnderTest(
        archive=f"{archive}/stills",
        url=str(tmp_path / "job"),
        weights=bare,
        folder=tmp_path / "logs",
        settings=("geometry.short_side_px=64", "output.class_ids_size=asset"),
    )
    with job.nothing_left():
        driver = job.run()
        assert driver.end() == 0, driver.said
        job.wait_until_gone()
    rows = table(job).to_pylist()
    assert [row["depth"] for row in rows] == [None, None]
    assert [row["depth_p50_m"] for row in rows] == [None, None]
    shapes = {row["asset"]: decode_class_ids(row["class_ids"]["bytes"]).shape for row in rows}
    assert shapes == {"one.jpg": (96, 160), "two.png": (200, 64)}
    metadata = pq.read_schema(next(iter((tmp_path / "job/gen-0000/data").iterdir()))).metadata
    assert b'"output.class_ids_size": "asset"' in metadata[b"segformer3d"]


def test_a_dry_run_foretells_the_plan(local, archive, tmp_path):
    fields = {
        "input": {"url": str(archive)},
        "output": {"url": str(tmp_path / "job")},
        "geometry": {"short_side_px": 64},
        "shard": {"frames": 16},
    }
    planner = Planner(check_spec(fields, "the job"))
    list(planner.shards())
    assert planner.plan().plan_id == local.plan().plan_id


def test_the_demo(tmp_path):
    result = run_demo(str(tmp_path / "demo"))
    assert (result.outcome, result.num_frames, result.num_ok) == ("done", 84, 84)
    drawn = cv2.imread(str(tmp_path / "demo" / "demo.png"))
    assert drawn.shape[1] == 3 * 640
    again = run_demo(str(tmp_path / "demo"))
    assert (again.outcome, again.num_computed) == ("done", 0)


def test_workers_beside_a_gpu_are_there_before_there_is_work():
    import ray

    from pipeline.actors import start_workers

    with connect(RaySection(num_cpus=2)):
        # From a worker, as an actor does.
        ray.get(ray.remote(num_cpus=0.5)(start_workers).remote(DecodeLimits(), 6))
        # Without being asked, Ray has one worker per CPU, and no child.
        wait_for(lambda: len(decoding_children()) > 2, 120.0)
        children = decoding_children()
    wait_for(lambda: not any(child.is_running() for child in children), 20.0)


def decoding_children():
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "pipeline.decode_child" in process.cmdline():
                found.append(process)
    return found
