"""The commit: one winner, whatever the store's acknowledgements say."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.commit import commit_attempt, parse_commit
from pipeline.errors import JobError
from pipeline.layout import Generation
from pipeline.records import CommitRecord
from pipeline.storage import open_store
from tests.shards import annotated_shard

GENERATION = Generation()
FRAMES = annotated_shard().frames


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "job"), create=True)


def attempt(store, data=b"data", shard_id=0):
    return commit_attempt(store, GENERATION, "plan", shard_id, FRAMES, data)


def data_keys(store):
    return sorted(item.key for item in store.list(GENERATION.data_prefix))


def test_the_record_names_what_was_written(store):
    record, won = attempt(store)
    assert won
    assert store.read(f"{GENERATION.prefix}{record.files[0].path}") == b"data"
    assert record.files[0].sha256 == hashlib.sha256(b"data").hexdigest()
    assert (record.num_rows, record.num_ok) == (3, 2)
    assert record.quarantined == (("drive/a.mp4", 1, "corrupt", "cannot be decoded"),)
    assert CommitRecord.from_json(store.read(GENERATION.commit_key(0))) == record


def test_a_second_attempt_loses_and_cleans_up(store):
    first, _ = attempt(store, b"one")
    second, won = attempt(store, b"two")
    assert not won
    assert second == first
    assert data_keys(store) == [f"{GENERATION.prefix}{first.files[0].path}"]


def test_sixteen_attempts_have_one_winner(store):
    for shard_id in range(10):
        with ThreadPoolExecutor(16) as pool:
            done = list(pool.map(lambda n, s=shard_id: attempt(store, b"%d" % n, s), range(16)))
        assert sum(won for _, won in done) == 1
        assert len({record.attempt for record, _ in done}) == 1
    assert len(data_keys(store)) == 10


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failing_acknowledgement_is_read_back(store, monkeypatch, when):
    create = store.create
    failures = iter([True])

    def flaky(key, data):
        if when == "after":
            create(key, data)
        if next(failures, False):
            raise TimeoutError("no answer")
        if when == "before":
            create(key, data)

    monkeypatch.setattr(store, "create", flaky)
    record, won = attempt(store)
    assert won
    assert data_keys(store) == [f"{GENERATION.prefix}{record.files[0].path}"]


def test_a_foreign_record_stops_the_run(store):
    attempt(store)
    with pytest.raises(JobError, match="expected plan"):
        commit_attempt(store, GENERATION, "other", 0, FRAMES, b"x")
    with pytest.raises(JobError, match="malformed"):
        parse_commit(b"{", "plan", 0)
