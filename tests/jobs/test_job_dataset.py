"""A finished job read as a data set: the labels it wrote, the frames of its archive."""

import hashlib
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import cli
from jobs.claim import make_record
from jobs.datasets import open_any_dataset
from jobs.job_dataset import JobDataset
from jobs.planner import Planner, make_plan, open_output
from jobs.record import claim_output
from jobs.spec import check_spec
from pipeline.decode import decode_shard
from pipeline.encode import decode_class_ids, decode_depth
from pipeline.errors import UserError
from pipeline.layout import Generation
from pipeline.records import Certainty
from pipeline.sinks.parquet import parse_parquet, read_rows
from pipeline.stages import AnnotateShard, PublishShard, StageContext
from pipeline.tables import PLAN_SCHEMA, AnnotatedShard, shards_from_table
from segformer3d.config import METRIC_DEPTH
from segformer3d.datasets import DatasetError
from segformer3d.draw import resize_depth
from segformer3d.weights import untrained_weights
from segformer3d.weights_file import read_info
from tests.jobs.job_parts import TINY
from tests.media import encode_cv2, picture, write_video

NUM_VIDEO_FRAMES = 30


def annotated(decoded, class_ids_size=None):
    """Made-up labels of the right sizes; the confidence rises with the frame's number."""
    rng = np.random.default_rng(decoded.shard_id)
    good = len(decoded.pixels)
    height, width = class_ids_size or decoded.pixels.shape[1:3]
    grid = decoded.pixels.shape[1] // 4, decoded.pixels.shape[2] // 4
    return AnnotatedShard(
        shard_id=decoded.shard_id,
        frames=decoded.frames,
        class_ids=tuple(rng.integers(0, 19, (height, width), np.uint8) for _ in range(good)),
        depth=tuple(rng.integers(0, 3, grid, np.uint16) * 256 for _ in range(good)),
        certainty=tuple(
            Certainty(
                confidence_mean=(frame.frame_index + 1) / NUM_VIDEO_FRAMES,
                entropy_mean=1.0,
            )
            for frame in decoded.frames
            if frame.error_kind is None
        ),
    )


def run_without_ray(folder, *, url=None, class_ids_size=None, weights=None):
    """Plan, decode and publish an archive for real; returns the job's URI and its decoded shards.

    The archive holds three images, one of them broken, and a video of four shards.
    """
    archive = folder / "archive"
    archive.mkdir()
    for name in ("a", "b"):
        data = encode_cv2(picture(seed=ord(name)), ".jpg")
        (archive / f"{name}.jpg").write_bytes(data)
    (archive / "broken.jpg").write_bytes(b"no image at all")
    write_video(archive / "drive.mp4", num_frames=NUM_VIDEO_FRAMES, gop=8)
    spec = check_spec(
        {
            "input": {"url": str(archive)},
            "output": {"url": url or str(folder / "job")},
            "geometry": {"short_side_px": 96},
            "shard": {"frames": 8},
        },
        "the job",
    )
    store = open_output(spec)
    claim_output(store, make_record(spec, untrained_weights(TINY)), single_driver=False)
    plan = make_plan(store, Generation(), Planner(spec))
    context = StageContext(
        job_url=store.url,
        job_storage=spec.output.storage.options(),
        archive_storage=spec.input.storage.options(),
        generation=0,
        plan_id=plan.plan_id,
        lease=1,
        metadata={},
        limits=spec.limits.limits(),
    )
    stage = AnnotateShard(context, weights) if weights else None
    parts = [pq.read_table(pa.BufferReader(store.read(part.key))) for part in plan.parts]
    decoded = []
    for shard in (shard for part in parts for shard in shards_from_table(part)):
        decoded.append(decode_shard(shard))
        made_up = annotated(decoded[-1], class_ids_size)
        PublishShard(context).publish(stage.annotate(decoded[-1]) if stage else made_up)
    return store, decoded


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run_without_ray(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def expected(job):
    """Name, image and labels of every good frame, straight from decoder and Parquet."""
    store, decoded = job
    keys = sorted(item.key for item in store.list(Generation().data_prefix))
    found = []
    for shard, key in zip(decoded, keys, strict=True):
        rows = [row for row in read_rows(store.read(key)) if row["status"] == "ok"]
        for row, image in zip(rows, shard.pixels, strict=True):
            depth = METRIC_DEPTH.decode(decode_depth(row["depth"]["bytes"]))
            size = image.shape[1], image.shape[0]
            name = f"{row['asset']}/{row['frame_index']:06d}"
            ids = decode_class_ids(row["class_ids"]["bytes"])
            found.append((name, image, ids, resize_depth(depth, size)))
    return found


def assert_same(sample, wanted):
    name, image, ids, depth = wanted
    assert sample.name == name
    assert np.array_equal(sample.image, image)
    assert np.array_equal(sample.class_ids, ids)
    assert np.array_equal(sample.depth, depth)
    assert sample.image.shape[:2] == ids.shape == depth.shape


def test_in_order_each_shard_is_decoded_once(job, expected, monkeypatch):
    source = open_any_dataset(f"job:{job[0].url}")
    assert len(source) == len(expected) == 2 + NUM_VIDEO_FRAMES
    assert source.depth_kind == "metric"
    calls = count_decodes(monkeypatch)
    for index, wanted in enumerate(expected):
        assert_same(source[index], wanted)
    with_frames = [shard.shard_id for shard in job[1] if len(shard.pixels)]
    assert [shard.shard_id for shard in calls] == with_frames
    assert len(with_frames) == 4


def test_out_of_order_only_the_frame_is_decoded(job, expected, monkeypatch):
    source = JobDataset(job[0].url)
    calls = count_decodes(monkeypatch)
    for index in (31, 5, 20, 0, 11, 3):
        assert_same(source[index], expected[index])
    assert [shard.num_frames for shard in calls[:5]] == [1] * 5


def count_decodes(monkeypatch):
    calls = []

    def decode(spec, *rest):
        calls.append(spec)
        return decode_shard(spec, *rest)

    monkeypatch.setattr("jobs.job_dataset.decode_shard", decode)
    return calls


def test_ranks_take_turns(job, expected, monkeypatch):
    source = JobDataset(job[0].url)
    calls = count_decodes(monkeypatch)
    for index in range(1, len(source), 4):
        assert_same(source[index], expected[index])
    assert len(calls) <= len(job[1])


def test_it_crosses_processes(job, expected):
    source = JobDataset(job[0].url)
    assert_same(source[7], expected[7])
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert_same(copy[8], expected[8])
    child = os.fork()
    if child == 0:
        same = np.array_equal(source[9].image, expected[9][1])
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_job_on_s3(tmp_path, s3_bucket_url, expected):
    store, _ = run_without_ray(tmp_path, url=s3_bucket_url)
    source = open_any_dataset(f"job:{store.url}?min_confidence=0.5")
    assert len(source) == 16
    assert_same(source[0], next(item for item in expected if item[0] == source[0].name))


def test_the_model_agrees_with_its_own_job(tmp_path):
    """One path from pixels to labels: evaluation sees what the job saw, but for rounding."""
    from jobs.evaluate import evaluate_weights

    weights = untrained_weights(TINY)
    store, _ = run_without_ray(tmp_path, weights=weights)
    (tmp_path / "tiny.safetensors").write_bytes(weights)
    found = evaluate_weights(
        str(tmp_path / "tiny.safetensors"), f"job:{store.url}", short_side_px=96, device="cpu"
    )
    assert found.num_frames == 32
    assert found.classes.pixel_accuracy > 0.9999
    assert found.depth.rmse < 0.01


def test_only_confident_frames(job, expected):
    source = open_any_dataset(f"job:{job[0].url}?min_confidence=0.5")
    names = [source[index].name for index in range(len(source))]
    wanted = [
        name for name, *_ in expected if (int(name[-6:]) + 1) / NUM_VIDEO_FRAMES >= 0.5 - 1e-6
    ]
    assert names == wanted
    assert len(names) == 16
    with pytest.raises(UserError, match="no good frame"):
        JobDataset(job[0].url, min_confidence=1.01)


def test_class_ids_at_the_assets_size_come_down_to_the_images(tmp_path):
    store, decoded = run_without_ray(tmp_path, class_ids_size=(48, 72))
    sample = JobDataset(store.url)[0]
    assert sample.class_ids.shape == sample.image.shape[:2] == decoded[0].pixels.shape[1:3]


def test_an_archive_that_changed_is_told(tmp_path):
    store, _ = run_without_ray(tmp_path)
    (tmp_path / "archive/a.jpg").write_bytes(b"something else")
    source = JobDataset(store.url)
    with pytest.raises(DatasetError, match=r"a\.jpg, frame 0: the archive no longer gives it"):
        source[0]
    # The others of its shard are still there.
    assert source[1].name == "b.jpg/000000"


def test_jobs_that_are_no_data_set(job, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_any_dataset(f"job:{tmp_path / 'none'}")
    store, _ = run_without_ray(tmp_path)
    store.delete([Generation().commit_key(1)])
    with pytest.raises(UserError, match="shards are done; finish it"):
        JobDataset(store.url)


def test_a_missing_data_object_is_told(tmp_path):
    store, _ = run_without_ray(tmp_path)
    store.delete([next(item.key for item in store.list(Generation().data_prefix))])
    with pytest.raises(UserError, match="verify"):
        JobDataset(store.url)


def test_a_damaged_label_is_told(tmp_path):
    store, _ = run_without_ray(tmp_path)
    source = JobDataset(store.url)
    key = next(item.key for item in store.list(Generation().data_prefix))
    data = bytearray(store.read(key))
    # A pixel of a label, which would still be read.
    data[data.index(b"IDAT") + 20] ^= 1
    store.put(key, bytes(data))
    message = f"{key}: other content than was committed; see `segformer3d verify`"
    with pytest.raises(DatasetError, match=message):
        source[0]


def pin(store, data):
    """Let the plan say that its one part is this."""
    plan_key = Generation().plan_key
    plan = json.loads(store.read(plan_key))
    plan["parts"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    store.put(plan_key, json.dumps(plan).encode())


def test_a_frame_that_nobody_planned_is_told(tmp_path):
    store, _ = run_without_ray(tmp_path)
    key = next(item.key for item in store.list("gen-0000/plan/") if item.key.endswith(".parquet"))
    plan = parse_parquet(store.read(key)).to_pylist()
    plan[0]["slices"][0]["asset"] = "c.jpg"
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(plan, schema=PLAN_SCHEMA), sink)
    data = sink.getvalue().to_pybytes()
    store.put(key, data)
    pin(store, data)
    source = JobDataset(store.url)
    with pytest.raises(DatasetError, match=r"a row of a\.jpg, frame 0, unplanned; see"):
        source[0]


@pytest.mark.parametrize("value", ["2", "-0.1", "nan", "much"])
def test_a_wrong_confidence(job, value):
    with pytest.raises(DatasetError, match="0 to 1"):
        open_any_dataset(f"job:{job[0].url}?min_confidence={value}")


def test_other_kinds_pass_through(job):
    assert len(open_any_dataset("scenes:?count=3")) == 3
    with pytest.raises(DatasetError, match="job"):
        open_any_dataset("jobs:/x")


def test_a_job_without_segmentation(job):
    source = JobDataset(job[0].url)
    row = {"asset": "a.jpg", "frame_index": 0, "class_ids": None, "depth": None}
    sample = source._sample(row, np.zeros((32, 32, 3), np.uint8))
    assert (sample.class_ids, sample.depth) == (None, None)


def test_a_job_is_what_the_next_weights_are_trained_on(job, tmp_path, capsys):
    """The loop closes: `train` learns from what a job wrote, and from nothing else."""
    recipe = {
        "model": {"variant": TINY, "head_width": 16, "depth_activation": "exp"},
        "short_side_px": 96,
        "data": [{"dataset": f"job:{job[0].url}"}],
        "phases": [{"steps": 30, "crop_px": [64, 64], "batch": 2}],
        "optimizer": {"rate": 3e-3},
        "loss": {"depth_kind": "log_l1"},
        "validation": {
            "datasets": {"job": f"job:{job[0].url}"},
            "losses": True,
            "every_steps": 15,
            "best": ["-job.loss"],
            "limit": 4,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code = cli.run(["train", str(path), "--output", str(tmp_path / "trained"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["outcome"], report["step"]) == (0, "done", 30)
    rows = (tmp_path / "trained" / "log.csv").read_text().splitlines()
    losses = [float(row.split(",")[2]) for row in rows if ",job.loss," in row]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    info = read_info(tmp_path / "trained" / "best.safetensors")
    assert info.quality["job.loss"] == pytest.approx(losses[1])
