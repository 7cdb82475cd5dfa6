"""S3 that fails in a fifth of all requests: a job ends right, or stops, says why, and resumes."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np
import pytest

import jobs.verify  # noqa: F401 - whose ranges are to be small, too
from jobs.planner import Planner
from jobs.spec import check_spec
from pipeline.decode import decode_shard, probe_assets
from pipeline.errors import UserError
from pipeline.records import Asset, ShardSpec
from pipeline.sources.assets import AssetProbe
from pipeline.storage import StorageOptions, open_store
from pipeline.tables import DecodedShard
from tests.budget import Share
from tests.fault_proxy import FAULTS, Fault, FaultProxy, run_fault_proxy
from tests.jobs import crash_points
from tests.jobs.crash_jobs import (
    EXIT_QUARANTINED,
    KilledJob,
    Reference,
    make_archive,
    make_reference,
)
from tests.jobs.crash_points import HURRIED_TIMEOUT_S
from tests.jobs.local_graph import small_ranges

SEED = 20261126
SHARE = 0.2
NUM_SEEDS = 50
MIXED_SHARE = Share(8)
TRANSIENT = tuple(kind for kind in FAULTS if kind != "expired")
NUM_ARCHIVE_SEEDS = 4
# After so many drivers that gave up, somebody mends the network.
MOST_STOPS = 4
# How many requests credentials are good for that expire.
LIFETIMES = (25, 150)
# What a driver may say of each fault when it gives up.
REASONS: dict[Fault, tuple[str, ...]] = {
    "503": ("SlowDown", "503"),
    "reset": ("error sending request", "Connection reset", "Connection was closed"),
    "lost acknowledgement": ("error sending request", "Connection reset", "Connection was closed"),
    "slow": ("timed out", "timeout", "Timeout"),
    "409": ("ConditionalRequestConflict", "exists"),
    "412": ("PreconditionFailed", "exists"),
    "short body": ("body", "incomplete", "Connection"),
    # If the credentials are good again when GET asks what HEAD's answer has no room for.
    "expired": ("ExpiredToken", "access denied"),
}


@pytest.fixture(scope="module", autouse=True)
def ranges() -> Iterator[None]:
    with small_ranges():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[FaultProxy]:
    with run_fault_proxy(s3_server, too_slow_s=HURRIED_TIMEOUT_S + 0.5) as proxy:
        yield proxy


@dataclass
class Story:
    """What became of a job.

    Attributes:
        num_requests: Requests of all its drivers.
        injected: Faults among them, by kind.
        stops: What the drivers that stopped said.
    """

    num_requests: int
    injected: Counter[str]
    stops: list[str]


def run_to_the_end(
    reference: Reference,
    proxy: FaultProxy,
    url: str,
    kinds: Sequence[Fault],
    seed: int,
    *,
    expires: bool = False,
) -> Story:
    """Run a job through the proxy, and resume it until it is done; then compare."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    job = reference.job(url, environment | {"AWS_ENDPOINT_URL": proxy.url})
    rng = random.Random(seed)
    proxy.arm(kinds, SHARE, seed)
    injected: Counter[str] = Counter()
    num_requests = 0
    stops: list[str] = []
    while True:
        proxy.expire_after(rng.randint(*LIFETIMES) if expires else None)
        kept = job.look.commits()
        code, said = _run(job, rng)
        injected += proxy.injected
        num_requests += proxy.num_requests
        job.assert_kept(kept)
        if code == EXIT_QUARANTINED:
            break
        stops.append(_reason(said, [*kinds, "expired"] if expires else kinds))
        assert len(stops) <= MOST_STOPS, stops
        expires = expires and len(stops) < MOST_STOPS
        proxy.arm(kinds if len(stops) < MOST_STOPS else (), SHARE, rng.randrange(2**32))
    proxy.arm((), 0.0, seed)
    job.assert_as_undisturbed()
    return Story(num_requests, injected, stops)


def _run(job: KilledJob, rng: random.Random) -> tuple[int, str]:
    orders = replace(job.again(by_uri=rng.random() < 0.5), hurried=True)
    return crash_points.run(orders), orders.said.read_text()


def _reason(said: str, kinds: Sequence[Fault]) -> str:
    """The one line that a driver gives up with, which names what happened."""
    assert "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("segformer3d: "), said
    assert any(word in last for kind in kinds for word in REASONS[kind]), said
    return last


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fifth_of_all_requests_fails(
    reference: Reference, proxy: FaultProxy, s3_bucket_url: str, kind: Fault
) -> None:
    story = run_to_the_end(reference, proxy, s3_bucket_url, [kind], SEED)
    assert story.injected[kind] >= 3
    print(
        f"PROOF S3 fault {kind}: {story.injected[kind]} of {story.num_requests} requests, "
        f"{len(story.stops)} stops, final set right"
    )
    for line in story.stops:
        print(f"  {line}")


def test_credentials_expire(reference: Reference, proxy: FaultProxy, s3_bucket_url: str) -> None:
    story = run_to_the_end(reference, proxy, s3_bucket_url, [], SEED, expires=True)
    assert story.stops
    assert all("ExpiredToken" in line for line in story.stops), story.stops
    print(f"PROOF S3 credentials expire: {len(story.stops)} stops resumed, final set right")


@dataclass(frozen=True)
class Archive:
    """An archive on S3, and what its decoder says when nothing fails."""

    root: str
    assets: tuple[Asset, ...]
    probes: list[AssetProbe]
    shards: list[ShardSpec]
    decoded: list[DecodedShard]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Archive:
    folder = make_archive(tmp_path_factory.mktemp("archive") / "files")
    root = f"s3://frames/{uuid4().hex}"
    store = open_store(root)
    for path in folder.iterdir():
        store.put(path.name, path.read_bytes())
    fields = {
        "input": {"url": root},
        "output": {"url": str(folder)},
        "geometry": {"short_side_px": 64},
        "shard": {"frames": 4},
    }
    planner = Planner(check_spec(fields, "the job"))
    shards = list(planner.shards())
    return Archive(
        root=root,
        assets=tuple(planner.assets),
        probes=probe_assets(root, planner.assets, StorageOptions()),
        shards=shards,
        decoded=[decode_shard(shard, StorageOptions()) for shard in shards],
    )


def test_an_archive_that_fails_now_and_then_loses_no_frame(
    archive: Archive, proxy: FaultProxy
) -> None:
    through = StorageOptions(endpoint_url=proxy.url)
    injected: Counter[str] = Counter()
    num_requests = 0
    for seed in range(NUM_ARCHIVE_SEEDS):
        proxy.arm(TRANSIENT, SHARE, SEED + seed)
        assert probe_assets(archive.root, archive.assets, through) == archive.probes
        for shard, undisturbed in zip(archive.shards, archive.decoded, strict=True):
            decoded = decode_shard(shard, through)
            assert decoded.frames == undisturbed.frames
            assert np.array_equal(decoded.pixels, undisturbed.pixels)
        injected += proxy.injected
        num_requests += proxy.num_requests
    proxy.arm((), 0.0, SEED)
    assert injected.total() >= NUM_ARCHIVE_SEEDS
    print(
        f"PROOF S3 faults of the archive: {injected.total()} of {num_requests} requests, "
        "no frame lost"
    )


def test_expired_credentials_are_no_fault_of_the_archive(
    archive: Archive, proxy: FaultProxy
) -> None:
    """They stop the run; rows that call each frame forbidden would be for good."""
    through = StorageOptions(endpoint_url=proxy.url)
    for num_requests in range(4):
        proxy.expire_after(num_requests)
        with pytest.raises(UserError, match="ExpiredToken"):
            probe_assets(archive.root, archive.assets, through)
    for shard in archive.shards:
        if any(part.error_kind is None for part in shard.slices):
            proxy.expire_after(0)
            with pytest.raises(UserError, match="ExpiredToken"):
                decode_shard(shard, through)
    proxy.expire_after(None)
    decoded = [decode_shard(shard, through) for shard in archive.shards]
    assert [shard.frames for shard in decoded] == [shard.frames for shard in archive.decoded]


@pytest.mark.slow
@pytest.mark.timeout(MIXED_SHARE.timeout_s)
def test_faults_of_all_kinds_mixed(reference: Reference, proxy: FaultProxy, s3_server: str) -> None:
    injected: Counter[str] = Counter()
    num_jobs = num_requests = num_stops = 0
    for number in MIXED_SHARE.rounds(NUM_SEEDS):
        url, seed = f"s3://out/{uuid4().hex}", SEED + number
        story = run_to_the_end(reference, proxy, url, TRANSIENT, seed, expires=number % 2 == 0)
        injected += story.injected
        num_jobs += 1
        num_requests += story.num_requests
        num_stops += len(story.stops)
    kinds_said = ", ".join(f"{count} {kind}" for kind, count in injected.most_common())
    print(
        f"PROOF S3 faults mixed: {num_jobs} of {NUM_SEEDS} jobs, {injected.total()} of "
        f"{num_requests} requests failed ({kinds_said}), {num_stops} stops resumed, "
        f"every final set right"
    )
