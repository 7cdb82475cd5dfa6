"""Check a job against itself: plan, commit records, data objects, rows."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.manifest import Manifest
from jobs.plan import Plan, read_plan
from jobs.progress import Progress
from jobs.record import read_job
from pipeline.errors import ObjectNotFoundError, UserError
from pipeline.layout import Generation, attempt_of, shard_of
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
    """Read every commit record and every byte of every data object that one names.

    Finds objects that are missing, of another size or of other content; rows that are missing,
    twice or not planned; records, data and shards that are not the plan's.

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
    _check_foreign(store, generation, plan, findings)
    if findings.num_faults:
        return findings
    manifest = Manifest.load(store, generation, plan.plan_id, plan.num_shards)
    records = {record.shard_id: record for record in manifest.records()}
    findings.num_decided = len(records)
    with Progress("verifying", plan.num_frames) as progress:
        for spec in _planned(store, plan):
            record = records.get(spec.shard_id)
            if record is None:
                findings.undecided.append(spec.shard_id)
            else:
                _check_shard(store, generation, spec, record, findings)
            progress.advance(spec.num_frames)
    _check_orphans(store, generation, records, findings)
    return findings


def _planned(store: Store, plan: Plan) -> Iterator[ShardSpec]:
    for part in plan.parts:
        yield from shards_from_table(pq.read_table(pa.BufferReader(store.read(part.key))))


def _check_foreign(store: Store, generation: Generation, plan: Plan, findings: Findings) -> None:
    for item in store.list(generation.commit_prefix):
        shard_id = shard_of(item.key)
        known = shard_id is not None and 0 <= shard_id < plan.num_shards
        if not known or item.key != generation.commit_key(shard_id or 0):
            findings.fault(f"{item.key}: not a commit record of this plan")


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
