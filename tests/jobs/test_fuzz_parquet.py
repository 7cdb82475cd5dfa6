"""Mutated Parquet: a job as a data set, and the readers alone, which a digest does not protect.

Each mutant is refused with a typed error that names it, or read; what was committed is never
mistaken for something else.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jobs.datasets import open_any_dataset
from jobs.generations import History, read_part
from pipeline.encode import decode_class_ids, decode_depth
from pipeline.errors import JobError, Segformer3dError
from pipeline.sinks.parquet import read_rows
from segformer3d.datasets import DatasetError
from tests.budget import Share
from tests.hostile_media import mutated
from tests.jobs.test_job_dataset import run_without_ray

SEED = 20_261_127
NUM_FAST, NUM_MUTANTS = 60, 3_000
SHARE = Share(3)
# The schema and the places of the columns: where damage goes far.
FOOTER_BYTES = 2_500


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run_without_ray(tmp_path_factory.mktemp("job"))[0]


def mutant_of(data, rng):
    place = max(0, len(data) - FOOTER_BYTES) if rng.random() < 0.5 else 0
    changed, _ = mutated(data[place:], rng)
    return data[:place] + changed


def samples(url):
    """Every sample of a job, or why there is none."""
    try:
        source = open_any_dataset(f"job:{url}")
    except Segformer3dError as error:
        return str(error)
    return [sample_of(source, index) for index in range(len(source))]


def sample_of(source, index):
    try:
        sample = source[index]
    except (DatasetError, JobError) as error:
        return str(error)
    return sample.name, sample.image.tobytes(), sample.class_ids.tobytes(), sample.depth.tobytes()


def read_alone(store, plan, key, data):
    """With no digest that would have told of the damage before; why it is refused, if it is."""
    try:
        if "/plan/" in key:
            (part,) = (part for part in plan.parts if part.key == key)
            read_part(store, replace(part, sha256=None))
            return ""
        for row in read_rows(data):
            if row.get("class_ids"):
                decode_class_ids(row["class_ids"]["bytes"])
            if row.get("depth"):
                decode_depth(row["depth"]["bytes"])
    except (ValueError, JobError) as error:
        return str(error)
    return ""


def fuzz(store, rounds):
    keys = [item.key for item in store.list("gen-0000/") if item.key.endswith(".parquet")]
    plan = History.load(store).views[0].plan
    whole = samples(store.url)
    assert len(whole) > 20
    assert not any(isinstance(sample, str) for sample in whole)
    rng = np.random.default_rng(SEED)
    seen = Counter()
    for _ in rounds:
        key = keys[rng.integers(len(keys))]
        data = store.read(key)
        store.put(key, mutant_of(data, rng))
        found = samples(store.url)
        if isinstance(found, str):
            assert key in found
            seen["not opened"] += 1
        else:
            refused = [sample for sample in found if isinstance(sample, str)]
            assert all(key in said or "verify" in said for said in refused)
            # Whatever is read is what was committed.
            pairs = zip(found, whole, strict=True)
            assert all(sample == good or sample in refused for sample, good in pairs)
            seen["samples refused" if refused else "read"] += 1
        refusal = read_alone(store, plan, key, store.read(key))
        assert len(refusal.splitlines()) <= 1
        seen["refused by the reader"] += bool(refusal)
        store.put(key, data)
    assert samples(store.url) == whole
    return seen


def said(seen):
    num = seen.total() - seen["refused by the reader"]
    return f"{num} mutants of Parquet: {', '.join(f'{n} {what}' for what, n in seen.most_common())}"


def test_sixty_mutants_of_a_job_as_a_data_set(store):
    seen = fuzz(store, range(NUM_FAST))
    assert min(seen["not opened"], seen["samples refused"], seen["refused by the reader"]) > 5
    print(f"PROOF fuzz (fast): {said(seen)}")


@pytest.mark.slow
@pytest.mark.timeout(SHARE.timeout_s)
def test_thousands_of_mutants_of_a_job_as_a_data_set(store):
    seen = fuzz(store, SHARE.rounds(NUM_MUTANTS))
    print(f"PROOF fuzz of {NUM_MUTANTS}: {said(seen)}")
