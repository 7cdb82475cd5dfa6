"""An output belongs to one job; anything else is refused by name."""

import dataclasses

import pytest

from jobs.claim import make_record
from jobs.record import JobRecord, claim_output, read_job
from jobs.spec import check_spec
from pipeline.errors import ConflictError, JobError, UserError
from pipeline.storage import open_store
from segformer3d.weights import untrained_weights
from tests.jobs.job_parts import TINY


@pytest.fixture(scope="module")
def record():
    return make(shard={"frames": 4})


def make(seed=0, **sections):
    fields = {"input": {"url": "/a"}, "output": {"url": "/b"}, **sections}
    return make_record(check_spec(fields, "the job"), untrained_weights(TINY, seed))


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "job"), create=True)


def test_the_first_claim_counts_and_the_same_job_may_return(store, record):
    assert claim_output(store, record, single_driver=False) == record
    assert claim_output(store, record, single_driver=False) == record
    assert read_job(store) == record
    assert [item.key for item in store.list("")] == ["job.json"]


def test_ray_settings_and_versions_do_not_matter(store, record):
    claim_output(store, record, single_driver=False)
    other = dataclasses.replace(make(shard={"frames": 4}, ray={"max_actors": 1}))
    assert claim_output(store, other, single_driver=False) == record


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: make(shard={"frames": 5}), "shard.frames: 4 there, 5 asked"),
        (lambda: make(seed=1, shard={"frames": 4}), "weights_sha256"),
        (
            lambda: make(shard={"frames": 4}, geometry={"short_side_px": 64}),
            "geometry.short_side_px: 512 there, 64 asked",
        ),
        (
            lambda: dataclasses.replace(make(shard={"frames": 4}), output_version=9),
            "output_version",
        ),
        (
            lambda: dataclasses.replace(make(shard={"frames": 4}), depth_codec=None),
            "depth_codec",
        ),
        (lambda: dataclasses.replace(make(shard={"frames": 4}), labels=["road"]), "labels"),
        (
            lambda: dataclasses.replace(make(shard={"frames": 4}), preprocessing={}),
            "preprocessing",
        ),
    ],
)
def test_another_job_is_refused_by_name(store, record, other, named):
    claim_output(store, record, single_driver=False)
    with pytest.raises(ConflictError) as caught:
        claim_output(store, other(), single_driver=False)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_other_things_is_refused(store, record):
    store.put("holiday/photo.jpg", b"x")
    with pytest.raises(UserError, match="not empty and holds no job"):
        claim_output(store, record, single_driver=False)


def test_a_store_without_conditional_writes_needs_a_word_from_the_user(store, record, monkeypatch):
    monkeypatch.setattr(store, "create", store.put)
    with pytest.raises(UserError, match="ignores conditional writes"):
        claim_output(store, record, single_driver=False)
    assert claim_output(store, record, single_driver=True) == record


def test_no_job_or_a_broken_one(store):
    with pytest.raises(UserError, match="no job here"):
        read_job(store)
    for data in (b"{", b"{}", b'{"speed": 1}'):
        store.put("job.json", data)
        with pytest.raises(JobError, match="cannot be read by this version"):
            read_job(store)


def test_a_job_of_another_layout(store, record):
    store.put("job.json", dataclasses.replace(record, layout_version=99).to_json())
    with pytest.raises(JobError, match="its layout is 99"):
        read_job(store)


def test_json_round_trip(record):
    assert JobRecord.from_json(record.to_json()) == record
