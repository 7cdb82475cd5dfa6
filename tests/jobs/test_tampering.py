"""Whatever is done to an object of a finished job, `verify` says so, and nothing crashes."""

import json
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest

from jobs.lease import heartbeats, mark_cancelled, request_cancel, take_lease
from jobs.status import find_jobs, job_status
from jobs.verify import verify_job
from pipeline.errors import Segformer3dError
from pipeline.layout import LEASE_PREFIX, MANIFEST_PREFIX, PROBE_PREFIX, Generation
from pipeline.records import canonical_json
from pipeline.storage import StorageOptions
from tests.budget import Share
from tests.jobs.job_parts import finish_job, make_job, where

SEED = 5
NUM_CHANGES = 5000
SHARE = Share(6)
GENERATION = Generation()
# News of drivers, and traces of the store's own test: nothing is decided by them.
NEWS = (LEASE_PREFIX, PROBE_PREFIX)


@pytest.fixture
def job(tmp_path, job_url):
    """A finished job with everything that one may hold."""
    made = published(tmp_path, job_url)
    finish_job(made)
    lease = take_lease(made.store)
    mark_cancelled(made.store, lease)
    assert verify(made).is_complete
    return made


def published(folder, url=None):
    made = make_job(folder, url=url, num_images=5)
    made.publish(range(made.plan.num_shards))
    return made


@pytest.mark.parametrize("value", [1, 10**6, "", "ab" * 32])
def test_a_record_is_checked_where_no_snapshot_says_it_again(tmp_path, value):
    made = published(tmp_path)
    key = GENERATION.commit_key(0)
    record = json.loads(made.store.read(key))
    record["files"][0]["size_bytes" if isinstance(value, int) else "sha256"] = value
    made.store.put(key, canonical_json(record))
    assert verify(made).broken == {(0, 0)}


def verify(job):
    return verify_job(job.store.url, StorageOptions())


def is_noticed(job):
    try:
        return not verify(job).is_complete
    except Segformer3dError:
        return True


def look_around(job):
    """What reads a job for a person must live through anything."""
    with suppress(Segformer3dError):
        job_status(job.store.url, StorageOptions()).text()
    for found in find_jobs(job.store.url, StorageOptions()):
        found.line()
        found.text()
    [beat.is_alive for beat in heartbeats(job.store)]
    request_cancel(job.store)


def flip(data, rng):
    changed = bytearray(data)
    for place in rng.integers(len(data), size=1 + rng.integers(3) * rng.integers(2)):
        changed[place] ^= 1 + rng.integers(255)
    return bytes(changed)


def flip_bit(data, rng):
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(changed)


def digit(data, rng):
    """Another digit, which leaves JSON whole."""
    places = [place for place, byte in enumerate(data) if 48 <= byte < 58]
    if not places:
        return flip(data, rng)
    changed = bytearray(data)
    place = places[rng.integers(len(places))]
    changed[place] = 48 + (changed[place] - 48 + 1 + rng.integers(9)) % 10
    return bytes(changed)


def cut(data, rng):
    return data[: rng.integers(len(data))]


def append(data, rng):
    return data + (rng.bytes(1 + rng.integers(20)) if rng.random() < 0.5 else b"\n")


def noise(data, rng):
    return rng.bytes(len(data))


CHANGES = (flip, flip, flip_bit, digit, digit, cut, append, noise)


def folder_of(key):
    depth = 2 if key.startswith("gen-") else 1
    return "/".join(key.split("/")[:depth])


def tamper(job, rng):
    """Do something to an object; returns what, and how to undo it."""
    keys = sorted(item.key for item in job.store.list(""))
    # Folders in turn, or the many PNGs would have it all.
    folders = sorted(set(map(folder_of, keys)))
    folder = folders[rng.integers(len(folders))]
    among = [key for key in keys if folder_of(key) == folder]
    key = among[rng.integers(len(among))]
    data = job.store.read(key)
    choice = rng.random()
    if choice < 0.1:
        job.store.delete([key])
        return "delete", key, {key: data}
    if choice < 0.2 and len(among) > 1:
        other = among[rng.integers(len(among))]
        theirs = job.store.read(other)
        job.store.put(key, theirs)
        job.store.put(other, data)
        return "swap", key, {key: data, other: theirs} if data != theirs else {}
    change = CHANGES[rng.integers(len(CHANGES))] if data else append
    changed = change(data, rng)
    job.store.put(key, changed)
    return change.__name__, key, {key: data} if changed != data else {}


def must_be_noticed(how, key, done):
    """Whether a job is not what it says after that.

    Without a snapshot it is as sound and complete as with one.
    """
    if not done or key.startswith(NEWS):
        return False
    if how == "delete" and key.startswith(MANIFEST_PREFIX):
        return False
    if "/png-done/" in key:
        # Only the marker's name says anything.
        return how == "delete"
    return True


def tamper_often(job, rounds):
    rng = np.random.default_rng(SEED)
    noticed, unnoticed = Counter(), Counter()
    for _ in rounds:
        how, key, done = tamper(job, rng)
        look_around(job)
        found = is_noticed(job)
        if must_be_noticed(how, key, done):
            assert found, (how, key)
            noticed[how] += 1
        else:
            unnoticed[how] += 1
        for changed, data in done.items():
            job.store.put(changed, data)
    assert verify(job).is_complete
    return noticed, unnoticed


def line(noticed, unnoticed):
    ways = ", ".join(f"{how} {count}" for how, count in noticed.most_common())
    return (
        f"{noticed.total()} of {noticed.total()} changes noticed ({ways}); {unnoticed.total()} more"
        " to drivers' news and markers' bytes; no crash of verify, status, list, cancel"
    )


@pytest.mark.parametrize(
    ("job_url", "num_changes"), [("local", 120), ("S3", 8)], indirect=["job_url"]
)
def test_tamperings_are_noticed(job, num_changes):
    noticed, unnoticed = tamper_often(job, range(num_changes))
    assert noticed.total() > num_changes / 3
    print(f"PROOF tampering (fast, {where(job.store.url)}): {line(noticed, unnoticed)}")


@pytest.mark.slow
@pytest.mark.timeout(SHARE.timeout_s)
def test_thousands_of_tamperings_are_noticed(job):
    noticed, unnoticed = tamper_often(job, SHARE.rounds(NUM_CHANGES))
    print(
        f"PROOF tampering: {noticed.total() + unnoticed.total()} of {NUM_CHANGES} changes made, "
        f"{line(noticed, unnoticed)}"
    )
