"""Archive -> assets -> shards: how a plan is made, the same one each time.

Shards follow the order of the assets' paths, whatever the order of the listing.
"""

import hashlib
import itertools
import os
import re
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.plan import Plan, PlanDigest, PlanPart, read_plan
from jobs.progress import say, track
from jobs.record import is_job
from jobs.spec import JobSpec
from pipeline.decode import probe_assets
from pipeline.errors import InputError, JobError, UserError
from pipeline.geometry import Geometry, input_size
from pipeline.layout import JOB_KEY, PNG_PREFIX, SHARDS_PER_RANGE, Generation
from pipeline.records import Asset, AssetKind, ShardSpec, Slice, canonical_json
from pipeline.sources.assets import AssetProbe
from pipeline.sources.listing import asset_kind, is_hidden, is_tar, list_assets
from pipeline.sources.slicing import SMALL_SLICE_FRAMES, Sampling, slice_asset
from pipeline.storage import (
    Store,
    compile_glob,
    create_once,
    open_input,
    open_store,
    unescape_path,
)
from pipeline.tables import shards_to_table

# Rows that are known to be errors have no pixels; their shards need some size all the same.
_NO_PIXELS_SIZE = (32, 32)
_PROBES_PER_CALL = 16
_MAX_PROBERS = 8
# Decoded frames of one shard, about; a shard may hold twice its target.
_MAX_SHARD_BYTES = 96 << 20
# Frames in small shards: the first, so that results come soon, and the last, of images or of one
# video, so that the models are done at about the same time.
_NUM_SMALL = 8 * SMALL_SLICE_FRAMES

T = TypeVar("T")


class Planner:
    """Plans one archive.

    Args:
        spec: The job.

    Raises:
        UserError: If the archive does not exist, or holds nothing to annotate.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.store, self.pattern = open_input(spec.input.url, spec.input.storage.options())
        self._excluded = _excluded(spec)
        self.assets, self.num_ignored = self._list()
        self._last_assets = _last_assets(self.assets)
        self._digest = PlanDigest()
        self._counts = dict.fromkeys(
            ("num_shards", "num_frames", "num_known_errors", "num_pixels"), 0
        )
        self._num_assets: Counter[AssetKind] = Counter()
        self._num_sliced = 0
        self._size_bytes = 0
        self._duration_s = 0.0

    def shards(self) -> Iterator[ShardSpec]:
        """Probe the assets and gather their frames into shards, in order; once only."""
        # How many members a tar has shows only when it is read.
        total = None if any(asset.kind == "tar" for asset in self.assets) else len(self.assets)
        probes = track(self._probes(), "planning", total=total, unit="assets")
        slices = gather(self._slices(probes))
        for shard_id, (size, parts) in enumerate(slices):
            shard = ShardSpec(
                shard_id=shard_id,
                root=self.store.url,
                input_width_px=size[0],
                input_height_px=size[1],
                slices=parts,
            )
            self._count(shard)
            yield shard

    def plan(self, parts: Sequence[PlanPart] = ()) -> Plan:
        """What was planned, after ``shards`` has been read to its end."""
        return Plan(
            plan_id=self._digest.plan_id,
            num_images=self._num_assets["image"],
            num_videos=self._num_assets["video"],
            num_ignored=self.num_ignored,
            size_bytes=self._size_bytes,
            video_duration_s=self._duration_s,
            num_shards=self._counts["num_shards"],
            num_frames=self._counts["num_frames"],
            num_known_errors=self._counts["num_known_errors"],
            num_pixels=self._counts["num_pixels"],
            parts=tuple(parts),
        )

    def _list(self) -> tuple[list[Asset], int]:
        if self.store.url == self.spec.output.url:
            message = f"{self.spec.output.url}: this is the archive's folder; name another --output"
            raise UserError(message)

        listing = list_assets(
            self.store, self.pattern, wanted=self._is_wanted, with_tars=True, watch=track
        )
        if listing.num_unreadable:
            say(f"{listing.num_unreadable} folders of the archive could not be read: left out.")
        assets = _without_outputs(self.store, listing.assets)
        _refuse_double_paths(assets)
        if not assets:
            message = (
                f"{self.spec.input.url}: no image, video or tar here"
                f" ({listing.num_ignored} other files); name a folder, a file or a glob"
            )
            raise UserError(message)
        return assets, listing.num_ignored

    def _is_wanted(self, key: str) -> bool:
        return not any(pattern.fullmatch(key) for pattern in self._excluded)

    def _probes(self) -> Iterator[AssetProbe]:
        """Probes in the order of the assets, from a few decoding children at a time."""
        pool = ThreadPoolExecutor(min(_MAX_PROBERS, os.cpu_count() or 1))
        try:
            waiting: deque[Future[list[AssetProbe]]] = deque()
            for chunk in _calls(self.assets):
                waiting.append(pool.submit(self._probe, chunk))
                if len(waiting) > 2 * _MAX_PROBERS:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            # An interrupted plan does not wait for what nobody will read.
            pool.shutdown(wait=False, cancel_futures=True)

    def _probe(self, assets: Sequence[Asset]) -> list[AssetProbe]:
        """Probe some assets; in the place of a tar come its members, and what is wrong with it."""
        options, limits = self.spec.input.storage.options(), self.spec.limits.limits()
        probes: list[AssetProbe] = []
        for probe in probe_assets(self.store.url, assets, options, limits):
            if probe.asset.kind == "tar":
                members, failed = self._contents(probe)
                for chunk in _chunks(iter(members), _PROBES_PER_CALL):
                    probes += probe_assets(self.store.url, chunk, options, limits)
                probes += failed
            else:
                probes.append(probe)
        return probes

    def _contents(self, tar: AssetProbe) -> tuple[list[Asset], list[AssetProbe]]:
        """The members of a tar that are to be probed, and what needs no further look."""
        wanted = [item for item in tar.members if self._is_wanted(unescape_path(item.path))]
        return wanted, faults_of_tar(tar)

    def _slices(self, probes: Iterable[AssetProbe]) -> Iterator[tuple[tuple[int, int], Slice, int]]:
        for probe in probes:
            self._num_assets[probe.asset.kind] += 1
            self._size_bytes += probe.asset.size_bytes
            self._duration_s += probe.duration_s
            target = self._target_frames(probe)
            num_last = _NUM_SMALL if probe.asset.path in self._last_assets else 0
            parts = self._parts(probe, target, num_last)
            num_left = sum(len(part.frame_index) for part in parts)
            for part in parts:
                is_small = self._num_small_left > 0 or num_left <= num_last
                self._num_sliced += len(part.frame_index)
                num_left -= len(part.frame_index)
                aim = min(target, SMALL_SLICE_FRAMES) if is_small else target
                yield *sized(part, self.spec.geometry.geometry()), aim

    @property
    def _num_small_left(self) -> int:
        """So many of the frames that come next go into small shards, since they are the first."""
        return max(0, _NUM_SMALL - self._num_sliced)

    def _parts(self, probe: AssetProbe, target_frames: int, num_last: int) -> list[Slice]:
        """Slices of one asset, small ones for so many of its last frames."""
        sampling = Sampling(
            every_nth=self.spec.sampling.every_nth,
            frames_per_second=self.spec.sampling.frames_per_second,
        )
        return slice_asset(
            probe,
            sampling=sampling,
            target_frames=target_frames,
            num_small=self._num_small_left,
            num_small_last=num_last,
        )

    def _target_frames(self, probe: AssetProbe) -> int:
        """Frames per shard: what the spec says, or as many as its memory bound allows."""
        if probe.error_kind is not None:
            return self.spec.shard.frames
        try:
            width, height = input_size(probe.width, probe.height, self.spec.geometry.geometry())
        except InputError:
            return self.spec.shard.frames
        frame_bytes = 3 * width * height
        if self.spec.output.class_ids_size == "asset":
            frame_bytes += probe.width * probe.height
        return max(1, min(self.spec.shard.frames, _MAX_SHARD_BYTES // frame_bytes))

    def _count(self, shard: ShardSpec) -> None:
        self._digest.add(shard)
        self._counts["num_shards"] += 1
        self._counts["num_frames"] += shard.num_frames
        for part in shard.slices:
            if part.error_kind is not None:
                self._counts["num_known_errors"] += len(part.frame_index)
            else:
                pixels = shard.input_width_px * shard.input_height_px
                self._counts["num_pixels"] += pixels * len(part.frame_index)


def faults_of_tar(tar: AssetProbe) -> list[AssetProbe]:
    """What stands for a tar that cannot be opened, or not be read to its end."""
    if tar.error_kind is not None:
        return [tar]
    if tar.missing_kind is None:
        return []
    kind, message = tar.missing_kind, tar.missing_error
    return [AssetProbe(asset=tar.asset, error_kind=kind, error=message)]


def sized(part: Slice, geometry: Geometry) -> tuple[tuple[int, int], Slice]:
    """The model input size of a slice; one that has none is turned into an error."""
    if part.error_kind is not None:
        return _NO_PIXELS_SIZE, part
    try:
        return input_size(part.width, part.height, geometry), part
    except InputError as error:
        return _NO_PIXELS_SIZE, replace(part, error_kind=error.kind, error=error.message)


def gather(
    slices: Iterable[tuple[tuple[int, int], Slice, int]],
) -> Iterator[tuple[tuple[int, int], tuple[Slice, ...]]]:
    """Slices of one input size together, until there are enough frames for a shard.

    Args:
        slices: ``(input size, slice, frames to aim at)``, in the order of the assets; a shard
            holds at most twice as many frames.

    Yields:
        ``(input size, slices)`` per shard.
    """
    waiting: dict[tuple[int, int], list[Slice]] = {}
    for size, part, target in slices:
        held = waiting.setdefault(size, [])
        frames = sum(len(item.frame_index) for item in held)
        if held and frames + len(part.frame_index) > 2 * target:
            yield size, tuple(held)
            held.clear()
            frames = 0
        held.append(part)
        if frames + len(part.frame_index) >= target:
            yield size, tuple(held)
            held.clear()
    for size, held in sorted(waiting.items()):
        if held:
            yield size, tuple(held)


def make_plan(store: Store, generation: Generation, planner: Planner) -> Plan:
    """Plan and fix the plan; if another driver was faster, theirs counts."""
    name = uuid.uuid4().hex
    parts: list[PlanPart] = []
    for shards in _chunks(planner.shards(), SHARDS_PER_RANGE):
        key = generation.plan_part_key(name, len(parts))
        data = _parquet(shards)
        store.put(key, data)
        part = PlanPart(
            key=key,
            first_shard=shards[0].shard_id,
            num_shards=len(shards),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        parts.append(part)
    planned = planner.plan(parts)
    if not planned.num_frames and planned.reason == "first":
        message = f"{planner.spec.input.url}: nothing is left to annotate; look at input.exclude"
        raise UserError(message)
    mine = canonical_json(asdict(planned))
    held = create_once(store, generation.plan_key, mine)
    if held != mine:
        store.delete([part.key for part in parts])
    plan = read_plan(store, generation)
    if plan is None:
        message = f"{store.url}: the plan disappeared while it was made"
        raise JobError(message)
    return plan


def check_archive(spec: JobSpec) -> None:
    """Find the archive's place, or raise ``UserError``; quick, before anything is written."""
    open_input(spec.input.url, spec.input.storage.options())


def check_assets(spec: JobSpec) -> None:
    """Look whether the archive holds anything to annotate; stops at the first such file.

    Raises:
        UserError: If it holds none.
    """
    store, pattern = open_input(spec.input.url, spec.input.storage.options())
    excluded = _excluded(spec)
    for info in store.glob(pattern, on_error=lambda *_: None):
        is_wanted = not any(pattern.fullmatch(info.key) for pattern in excluded)
        is_asset = asset_kind(info.key) is not None or is_tar(info.key)
        if is_asset and is_wanted and not is_hidden(info.key):
            return
    # Says what there is instead.
    Planner(spec)


def open_output(spec: JobSpec) -> Store:
    """The store of the job, made if it is a local folder that does not exist.

    Raises:
        UserError: If it cannot be reached or made.
    """
    return open_store(spec.output.url, spec.output.storage.options(), create=True)


def _last_assets(assets: Sequence[Asset]) -> frozenset[str]:
    """The paths of the images that end the archive, or of the video that does."""
    images = itertools.takewhile(lambda asset: asset.kind == "image", reversed(assets))
    last = list(itertools.islice(images, _NUM_SMALL)) or assets[-1:]
    return frozenset(asset.path for asset in last)


def _excluded(spec: JobSpec) -> list[re.Pattern[str]]:
    return [compile_glob(pattern) for pattern in spec.input.exclude]


def _without_outputs(store: Store, assets: Sequence[Asset]) -> list[Asset]:
    """Leave out the PNG trees of jobs whose output lies inside the archive, and say so."""
    jobs: dict[str, bool] = {}

    def is_output(asset: Asset) -> bool:
        folders = f"/{asset.path}".split(f"/{PNG_PREFIX}")
        for depth in range(1, len(folders)):
            folder = unescape_path(f"/{PNG_PREFIX}".join(folders[:depth]).lstrip("/"))
            if folder not in jobs:
                jobs[folder] = is_job(store, f"{folder}/{JOB_KEY}" if folder else JOB_KEY)
            if jobs[folder]:
                return True
        return False

    kept = [asset for asset in assets if not is_output(asset)]
    if len(kept) < len(assets):
        say(f"{len(assets) - len(kept)} PNGs of jobs inside the archive: left out.")
    return kept


def _refuse_double_paths(assets: Sequence[Asset]) -> None:
    """On S3, ``a.tar`` may be an object and a folder: two files could have one path.

    Raises:
        UserError: If that is so.
    """
    tars = {asset.path for asset in assets if asset.kind == "tar"}
    for asset in assets if tars else ():
        for parent in PurePosixPath(asset.path).parents:
            if str(parent) in tars:
                message = f"{parent}: both a tar and a folder; leave one out with input.exclude"
                raise UserError(message)


def _calls(assets: Sequence[Asset]) -> Iterator[list[Asset]]:
    """What to probe in one call: a few files, or one tar, which has many."""
    for alone, group in itertools.groupby(assets, lambda asset: asset.kind == "tar"):
        yield from _chunks(group, 1 if alone else _PROBES_PER_CALL)


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _parquet(shards: Sequence[ShardSpec]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(shards_to_table(shards), sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())
