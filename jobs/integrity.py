"""What `verify` compares beside records, data and plan: everything else that a job says of itself.

Each check takes ``fault``, which is told one line per thing that is wrong, and goes on.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from jobs.digests import fixed_digests
from jobs.finish import summarise
from jobs.generations import read_part
from jobs.plan import Plan
from jobs.record import OUTPUT_VERSION, JobRecord
from pipeline.errors import (
    DAMAGE,
    ERROR_KINDS,
    JobError,
    ObjectNotFoundError,
    Segformer3dError,
    StorageError,
)
from pipeline.layout import (
    JOB_KEY,
    Generation,
    shard_of,
)
from pipeline.records import CommitRecord, DataFile, ShardSpec, canonical_json
from pipeline.sinks.parquet import METADATA_KEY, parse_parquet
from pipeline.storage import Store
from segformer3d.labels import CLASSES


class Fault(Protocol):
    """Takes what is wrong; ``unread`` if an object could not be read, which says nothing of it."""

    def __call__(self, message: str, *, unread: bool = False) -> None:
        """Take one line."""


Broken = Callable[[int, str], None]

_ROW_COLUMNS = ["asset", "frame_index", "status", "error_kind", "error"]
# Of the success marker, what its generation's records decide.
_COUNTED = {"num_rows", "num_ok", "quarantined"}


def check_job(store: Store, job: JobRecord, fault: Fault) -> None:
    """Check ``job.json`` against its own form, its settings, and the weights in the job."""
    with_errors(JOB_KEY, lambda: _check_form(JOB_KEY, store.read(JOB_KEY), fault), fault)
    with_errors(JOB_KEY, lambda: _check_settings(job, fault), fault)
    with_errors(job.weights_key, lambda: _check_weights(store, job, fault), fault)


def check_generation(
    store: Store,
    generation: Generation,
    plan: Plan,
    records: Mapping[int, CommitRecord],
    job: JobRecord,
    success: bytes | None,
    fault: Fault,
    broken: Broken,
    *,
    hidden: frozenset[int],
) -> None:
    """Check all of a generation but its rows against each other.

    Args:
        store: The job's store.
        generation: Which generation.
        plan: Its plan.
        records: Its commit records, by shard.
        job: What ``job.json`` says.
        success: Its success marker, read before the records were; None if there was none.
        fault: Takes what is wrong.
        broken: Takes a shard and what is wrong, where doing the shard anew mends it.
        hidden: Shards that a repair has replaced, which nobody reads any more.
    """
    counts = _PlanCounts()

    def check_plan() -> None:
        for spec in _planned(store, plan):
            counts.add(spec)
        counts.compare(plan, generation, fault)

    with_errors(
        generation.plan_key,
        lambda: _check_form(generation.plan_key, store.read(generation.plan_key), fault),
        fault,
    )
    with_errors(generation.plan_key, check_plan, fault)
    with_errors(
        generation.commit_prefix,
        lambda: _check_records(store, generation, records, hidden, broken),
        fault,
    )
    with_errors(
        generation.data_prefix,
        lambda: _check_description(store, generation, plan, records, job, fault),
        fault,
    )
    if success is not None:
        with_errors(
            generation.success_key,
            lambda: _check_success(store, generation, plan, records, hidden, success, fault),
            fault,
        )


def check_rows(key: str, data: bytes, record: CommitRecord, fault: Fault) -> None:
    """Check a data object's rows against what its record says of every quarantined one."""

    def check() -> None:
        table = parse_parquet(data, _ROW_COLUMNS)
        held = []
        for row in table.to_pylist():
            if (row["status"] == "ok") != (row["error_kind"] is None):
                fault(f"{key}: a row of {row['asset']} is neither good nor an error")
            elif row["error_kind"] is not None:
                if row["error_kind"] not in ERROR_KINDS:
                    fault(f"{key}: no kind of error: {row['error_kind']!r}")
                entry = row["asset"], row["frame_index"], row["error_kind"], row["error"] or ""
                held.append(entry)
        if len(record.files) == 1 and sorted(held) != sorted(record.quarantined):
            fault(f"shard {record.shard_id}: its record names other errors than its data holds")

    with_errors(key, check, fault)


def with_errors(key: str, check: Callable[[], None], fault: Fault) -> None:
    """Run a check; whatever damage does to it is a fault of ``key``."""
    try:
        check()
    except ObjectNotFoundError:
        fault(f"{key}: missing")
    except StorageError as error:
        fault(f"{key}: cannot be read: {error}", unread=True)
    except (Segformer3dError, pa.ArrowException, *DAMAGE) as error:
        fault(f"{key}: cannot be read: {' '.join(str(error).split()) or type(error).__name__}")


def _check_form(key: str, data: bytes, fault: Fault) -> None:
    """Objects are written in one form, in which no byte may be another."""
    if canonical_json(json.loads(data)) != data:
        fault(f"{key}: not in the form in which it was written")


def _check_settings(job: JobRecord, fault: Fault) -> None:
    now = job.job_spec().identity()
    for name, value in job.identity.items():
        if name in now and now[name] != value:
            fault(f"{JOB_KEY}: {name} is not what its own settings say")
    if job.output_version == OUTPUT_VERSION and job.labels != [item.name for item in CLASSES]:
        fault(f"{JOB_KEY}: its labels are not those of its version")


def _check_weights(store: Store, job: JobRecord, fault: Fault) -> None:
    data = store.read(job.weights_key)
    if hashlib.sha256(data).hexdigest() != job.weights_sha256:
        fault(f"{job.weights_key}: not the weights that {JOB_KEY} names")
        return
    info = _weights_metadata(data)
    said = {
        "preprocessing": job.preprocessing,
        "depth_codec": job.depth_codec,
        "trained": job.trained,
    }
    _compare(said, info, "what the weights say", fault)


def _weights_metadata(data: bytes) -> dict[str, Any]:
    """What a safetensors file says of itself, without torch."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = json.loads(header.get("__metadata__", {}).get("segformer3d", "{}"))
    return dict(entry)


@dataclass
class _PlanCounts:
    """The counts of ``plan.json``, made again from its parts."""

    shard_ids: list[int] = field(default_factory=list)
    num_frames: int = 0
    num_known_errors: int = 0
    num_pixels: int = 0
    roots: set[str] = field(default_factory=set)
    assets: dict[str, set[int]] = field(
        default_factory=lambda: {"image": set(), "video": set(), "tar": set()}
    )
    size_bytes: int = 0

    def add(self, spec: ShardSpec) -> None:
        """Take the next shard."""
        self.shard_ids.append(spec.shard_id)
        self.roots.add(spec.root)
        self.num_frames += spec.num_frames
        for part in spec.slices:
            if part.error_kind is not None:
                self.num_known_errors += len(part.frame_index)
            else:
                pixels = spec.input_width_px * spec.input_height_px
                self.num_pixels += pixels * len(part.frame_index)
            seen, name = self.assets[part.kind], xxhash.xxh3_64_intdigest(part.asset.encode())
            if name not in seen:
                seen.add(name)
                self.size_bytes += part.size_bytes

    def compare(self, plan: Plan, generation: Generation, fault: Fault) -> None:
        """See that the plan says the same."""
        key = generation.plan_key
        if self.shard_ids != list(range(len(self.shard_ids))):
            fault(f"{key}: the shards of its parts are not numbered from 0")
        counted = {
            "num_shards": (plan.num_shards, len(self.shard_ids)),
            "num_frames": (plan.num_frames, self.num_frames),
            "num_known_errors": (plan.num_known_errors, self.num_known_errors),
            "num_pixels": (plan.num_pixels, self.num_pixels),
        }
        if generation.number == 0:
            # A later generation plans only some frames of some assets.
            counted["num_images"] = (plan.num_images, len(self.assets["image"]))
            counted["num_videos"] = (plan.num_videos, len(self.assets["video"]))
            counted["size_bytes"] = (plan.size_bytes, self.size_bytes)
        for name, (said, found) in counted.items():
            if said != found:
                fault(f"{key}: {name} is {said!r}, its parts hold {found}")
        if len(self.roots) > 1:
            fault(f"{key}: its parts name {len(self.roots)} archives")


def _planned(store: Store, plan: Plan) -> Iterator[ShardSpec]:
    for part in plan.parts:
        # Of one that cannot be read the other half of `verify` tells.
        with suppress(JobError, StorageError):
            yield from read_part(store, part)


def _check_records(
    store: Store,
    generation: Generation,
    records: Mapping[int, CommitRecord],
    hidden: frozenset[int],
    broken: Broken,
) -> None:
    for item in store.list(generation.commit_prefix):
        shard_id = shard_of(item.key)
        if shard_id is None or shard_id in hidden or shard_id not in records:
            continue
        if item.size_bytes != len(records[shard_id].to_json()):
            broken(shard_id, f"{item.key}: not in the form in which it was written")


def _check_description(
    store: Store,
    generation: Generation,
    plan: Plan,
    records: Mapping[int, CommitRecord],
    job: JobRecord,
    fault: Fault,
) -> None:
    """Compare what one data object, whose hash stands in its record, says of the whole job."""
    file = next((file for record in records.values() for file in record.files), None)
    if file is None:
        return
    key = f"{generation.prefix}{file.path}"
    metadata = _metadata(store, key, file)
    said = {
        "plan_id": plan.plan_id,
        "generation": generation.number,
        "weights_sha256": job.weights_sha256,
        "trained": job.trained,
        "preprocessing": job.preprocessing,
        "labels": job.labels,
        "depth_codec": job.depth_codec,
        "output_version": job.output_version,
        "identity": job.identity,
    }
    _compare(said, metadata, f"what {key} was made with", fault)


def _compare(said: dict[str, Any], found: dict[str, Any], what: str, fault: Fault) -> None:
    """See that ``job.json`` says the same as another object, as far as that says anything."""
    for name, value in said.items():
        if name in found and found[name] != value:
            fault(f"{JOB_KEY}: {name} is not {what}")


def _metadata(store: Store, key: str, file: DataFile) -> dict[str, Any]:
    try:
        data = store.read(key)
    except StorageError:
        return {}
    if hashlib.sha256(data).hexdigest() != file.sha256:
        # That is a fault already.
        return {}
    schema = pq.read_schema(pa.BufferReader(data))
    return dict(json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}")))


def _check_success(
    store: Store,
    generation: Generation,
    plan: Plan,
    records: Mapping[int, CommitRecord],
    hidden: frozenset[int],
    data: bytes,
    fault: Fault,
) -> None:
    key = generation.success_key
    _check_form(key, data, fault)
    said = json.loads(data)
    found = summarise(plan, records.values())
    for name, value in found.items():
        if hidden and name in _COUNTED:
            # Whoever wrote it may have counted what a repair has replaced since.
            continue
        if name not in said or said[name] != value:
            fault(f"{key}: {name} is {said.get(name)!r}, the records say {value!r}")
    for name in said.keys() - found.keys() - {"sha256"}:
        fault(f"{key}: {name} is nothing that a driver writes there")
    digests = said.get("sha256", {})
    for name, digest in fixed_digests(store, generation, plan).items():
        if digests and digests.get(name) != digest:
            fault(f"{name}: other content than when the generation was finished")
