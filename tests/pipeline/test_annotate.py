"""Frames of which the model says nothing that could be kept become typed rows, alone."""

import numpy as np
import pytest

from pipeline.decode import DecodeLimits
from pipeline.sinks.parquet import encode_shard, read_rows
from pipeline.stages import AnnotateShard, StageContext
from pipeline.storage import StorageOptions
from segformer3d.predictor import Predictions
from segformer3d.weights import untrained_weights
from tests.jobs.job_parts import TINY
from tests.shards import grey_shard

# A frame that is grey of this value is one that the model fails at.
BAD = 200


class ModelStandIn:
    """Says finite things of every frame but one; of that, what the test wants."""

    def __init__(self, *, has_memory):
        self.has_memory = has_memory
        self.asked = []

    def start(self, frames, class_ids_size=None):
        bad = frames[:, 0, 0, 0] == BAD
        self.asked.append(len(frames))
        if bad.any() and not self.has_memory:
            raise MemoryError
        count = len(frames)
        said = Predictions(
            class_ids=np.ascontiguousarray(frames[..., 0] % 19),
            depth=np.full((count, 16, 24), 500, np.uint16),
            confidence_mean=np.full(count, 0.5, np.float32),
            entropy_mean=np.ones(count, np.float32),
            finite=~bad,
        )
        return lambda: said


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    context = StageContext(
        job_url=str(tmp_path_factory.mktemp("job")),
        job_storage=StorageOptions(),
        archive_storage=StorageOptions(),
        generation=0,
        plan_id="plan",
        lease=1,
        metadata={},
        limits=DecodeLimits(),
    )
    return AnnotateShard(context, untrained_weights(TINY))


@pytest.mark.parametrize(
    ("has_memory", "kind", "asked"),
    [(True, "non_finite", [3]), (False, "out_of_memory", [3, 1, 1, 1])],
)
def test_a_frame_that_the_model_fails_at_is_an_error_and_the_others_keep_their_own(
    stage, has_memory, kind, asked
):
    stage.predictor = ModelStandIn(has_memory=has_memory)
    annotated = stage.annotate(grey_shard([10, BAD, 12]))
    assert stage.predictor.asked == asked
    rows = read_rows(encode_shard(annotated, {}))
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert [row["error_kind"] for row in rows] == [None, kind, None]
    assert rows[1]["error"]
    assert rows[1]["class_ids"] is None
    assert rows[1]["depth"] is None
    assert rows[1]["confidence_mean"] is None
    assert [ids[0, 0] for ids in annotated.class_ids] == [10, 12]
