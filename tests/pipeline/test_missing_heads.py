"""A job with weights that lack a head: rows of real frames with null for it, never noise."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.decode import DecodeLimits, decode_shard
from pipeline.stages import AnnotateShard, PublishShard, StageContext
from pipeline.storage import StorageOptions
from segformer3d.config import METRIC_DEPTH, ModelConfig, WeightsInfo
from segformer3d.model import build_model
from segformer3d.weights import weights_to_bytes
from tests.jobs.job_parts import TINY, make_job

CLASS_COLUMNS = ("class_ids", "class_fraction", "confidence_mean", "entropy_mean")
DEPTH_COLUMNS = ("depth", "depth_p05_m", "depth_p50_m", "depth_p95_m")


@pytest.mark.parametrize(
    ("lacking", "kept", "missing"),
    [
        ({"has_depth": False}, CLASS_COLUMNS, DEPTH_COLUMNS),
        ({"num_classes": None}, DEPTH_COLUMNS, CLASS_COLUMNS),
    ],
)
def test_what_the_weights_lack_is_null(tmp_path, lacking, kept, missing):
    job = make_job(tmp_path, num_images=2, bad=False)
    context = StageContext(
        job_url=job.store.url,
        job_storage=StorageOptions(),
        archive_storage=StorageOptions(),
        generation=0,
        plan_id=job.plan.plan_id,
        lease=1,
        metadata={},
        limits=DecodeLimits(),
    )
    torch.manual_seed(0)
    config = ModelConfig(variant=TINY, head_width=8, **lacking)
    model = build_model(config)
    if model.depth_head is not None:
        torch.nn.init.constant_(model.depth_head.predict.bias, 10.0)
    codec = METRIC_DEPTH if config.has_depth else None
    info = WeightsInfo(config=config, depth_codec=codec, training_data="tests")
    stage = AnnotateShard(context, weights_to_bytes(model, info))
    decoded = decode_shard(job.shards[0], StorageOptions(), DecodeLimits())
    # As it crosses from stage to stage in a run.
    PublishShard(context)(stage(decoded.to_table()))
    (key,) = [item.key for item in job.store.list("gen-0000/data/")]
    rows = pq.read_table(pa.BufferReader(job.store.read(key))).to_pylist()
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "ok"
        assert all(row[name] is None for name in missing)
        assert all(row[name] is not None for name in kept)
