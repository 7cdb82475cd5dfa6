"""Check a job against itself: plan, commit records, data objects, rows."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.manifest import Manifest
from jobs.plan import Plan, PlanDigest, read_plan
from jobs.progress import Progress
from jobs.record import read_job
from pipeline.commit import parse_commit
from pipeline.errors import JobError, ObjectNotFoundError, StorageError, UserError
from pipeline.layout import MANIFEST_PREFIX, Generation, attempt_of, shard_of
from pipeline.records import CommitRecord, ShardSpec, shards_from_table
from pipeline.sinks.parquet import frame_id
from pipeline.storage import StorageOptions, Store, open_store

_MOST_NAMED = 1000


@dataclass
class Findings:
    """What ``verify`` found.

    Attributes:
        url: The job's URI.
        num_shards: Shards of the plan.
        num_decided: Those with a commit record.
        num_frames: Planned frames of the decided shards.
        num_rows: Rows found for them.
        undecided: Shards without a commit record; not a fault while the job is unfinished.
        orphans: Data objects that no record names; harmless, a resume collects them.
        faults: One line each; the first thousand.
        num_faults: All of them.
    """

    url: str
    num_shards: int = 0
    num_decided: int = 0
    num_frames: int = 0
    num_rows: int = 0
    undecided: list[int] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0

    def fault(self, message: str) -> None:
        """Note one."""
        self.num_faults += 1
        if len(self.faults) < _MOST_NAMED:
            self.faults.append(message)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong with what is there."""
        return self.num_faults == 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing either."""
        return self.is_sound and not self.undecided

    def text(self) -> str:
        """A few lines for a person."""
        verdict = "sound and complete" if self.is_complete else "sound, unfinished"
        lines = [
            f"{self.url}: {verdict if self.is_sound else 'NOT SOUND'}",
            f"{self.num_decided} of {self.num_shards} shards decided, {self.num_rows} rows of"
            f" {self.num_frames} planned in them, {len(self.orphans)} orphans",
        ]
        lines += self.faults
        if self.num_faults > len(self.faults):
            lines.append(f"and {self.num_faults - len(self.faults)} more")
        return "\n".join(lines)


def verify_job(url: str, storage: StorageOptions) -> Findings:
    """Read the plan, every commit record, and every byte of every data object that one names.

    Finds objects that are missing, of another size or of other content; rows that are missing,
    twice or not planned; records, data and shards that are not the plan's; a sealed manifest that
    says other things than the records.

    Raises:
        UserError: If there is no job, or no plan yet.
    """
    store = open_store(url, storage)
    read_job(store)
    generation = Generation(0)
    plan = read_plan(store, generation)
    if plan is None:
        message = f"{store.url}: nothing to verify, the job is not planned yet"
        raise UserError(message)
    findings = Findings(url=store.url, num_shards=plan.num_shards)
    records = _read_records(store, generation, plan, findings)
    _check_snapshot(store, generation, plan, records, findings)
    findings.num_decided = len(records)
    digest = PlanDigest()
    with Progress("verifying", plan.num_frames) as progress:
        for spec in _planned(store, plan, findings):
            digest.add(spec)
            record = records.get(spec.shard_id)
            if record is None:
                findings.undecided.append(spec.shard_id)
            else:
                _check_shard(store, generation, spec, record, findings)
            progress.advance(spec.num_frames)
    if digest.plan_id != plan.plan_id:
        findings.fault(f"{generation.plan_key}: its parts hold another plan than it names")
    _check_orphans(store, generation, records, findings)
    return findings


def _read_records(
    store: Store, generation: Generation, plan: Plan, findings: Findings
) -> dict[int, CommitRecord]:
    """The commit records themselves, whatever a snapshot says of them."""
    keys: list[str] = []
    for item in store.list(generation.commit_prefix):
        shard_id = shard_of(item.key)
        known = shard_id is not None and shard_id < plan.num_shards
        if known and item.key == generation.commit_key(shard_id or 0):
            keys.append(item.key)
        else:
            findings.fault(f"{item.key}: not a commit record of this plan")
    records: dict[int, CommitRecord] = {}
    for key, data in store.read_many(keys):
        try:
            if isinstance(data, StorageError):
                raise data
            record = parse_commit(data, plan.plan_id, shard_of(key) or 0)
        except (JobError, StorageError) as error:
            findings.fault(f"{key}: {error}")
            continue
        records[record.shard_id] = record
    return records


def _check_snapshot(
    store: Store,
    generation: Generation,
    plan: Plan,
    records: dict[int, CommitRecord],
    findings: Findings,
) -> None:
    """What readers go by must be what the records say."""
    try:
        manifest = Manifest.load(store, generation, plan.plan_id, plan.num_shards)
        sealed = list(replace(manifest, open_ids=()).records())
    except (JobError, StorageError) as error:
        findings.fault(f"{MANIFEST_PREFIX}: {error}")
        return
    for record in sealed:
        if records.get(record.shard_id) != record:
            key = generation.commit_key(record.shard_id)
            findings.fault(f"{key}: missing, or not what the sealed manifest says")


def _planned(store: Store, plan: Plan, findings: Findings) -> Iterator[ShardSpec]:
    for part in plan.parts:
        try:
            table = pq.read_table(pa.BufferReader(store.read(part.key)))
            shards = shards_from_table(table)
        except (StorageError, pa.ArrowException, KeyError, TypeError, OSError) as error:
            findings.fault(f"{part.key}: cannot be read: {' '.join(str(error).split())}")
            continue
        yield from shards


def _check_shard(
    store: Store,
    generation: Generation,
    spec: ShardSpec,
    record: CommitRecord,
    findings: Findings,
) -> None:
    planned = [frame_id(part.asset, index) for part in spec.slices for index in part.frame_index]
    findings.num_frames += len(planned)
    held: list[str] = []
    num_ok = 0
    for file in record.files:
        key = f"{generation.prefix}{file.path}"
        try:
            data = store.read(key)
        except ObjectNotFoundError:
            findings.fault(f"{key}: missing")
            return
        except StorageError as error:
            findings.fault(f"{key}: cannot be read: {error}")
            return
        if len(data) != file.size_bytes:
            findings.fault(f"{key}: {len(data)} bytes, {file.size_bytes} committed")
            return
        if hashlib.sha256(data).hexdigest() != file.sha256:
            findings.fault(f"{key}: other content than was committed")
            return
        table = pq.read_table(pa.BufferReader(data), columns=["frame_id", "status"])
        held += table["frame_id"].to_pylist()
        num_ok += table["status"].to_pylist().count("ok")
    findings.num_rows += len(held)
    _compare(spec.shard_id, planned, held, findings)
    if (record.num_rows, record.num_ok) != (len(held), num_ok):
        findings.fault(f"shard {spec.shard_id}: its record counts other rows than its data holds")


def _compare(shard_id: int, planned: list[str], held: list[str], findings: Findings) -> None:
    wanted, found = Counter(planned), Counter(held)
    for name, number in (
        ("missing", (wanted - found).total()),
        ("extra", (found - wanted).total()),
    ):
        if number:
            findings.fault(f"shard {shard_id}: {number} rows {name}")


def _check_orphans(
    store: Store,
    generation: Generation,
    records: dict[int, CommitRecord],
    findings: Findings,
) -> None:
    named = {
        f"{generation.prefix}{file.path}" for record in records.values() for file in record.files
    }
    for item in store.list(generation.data_prefix):
        if item.key in named:
            continue
        attempt = attempt_of(item.key)
        if attempt is None or attempt[0] >= findings.num_shards:
            findings.fault(f"{item.key}: foreign object among the data")
        else:
            findings.orphans.append(item.key)
