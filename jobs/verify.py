"""Check a job against itself: plan, commit records, data objects, rows."""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from jobs.generations import frames_of, hidden_shards, read_part, read_plans
from jobs.integrity import check_generation, check_job, check_rows, with_errors
from jobs.manifest import Manifest
from jobs.plan import Plan, PlanDigest
from jobs.progress import Progress
from jobs.record import JobRecord, read_job
from pipeline.commit import parse_commit
from pipeline.errors import JobError, ObjectNotFoundError, StorageError, UserError
from pipeline.layout import MANIFEST_PREFIX, Generation, attempt_of, shard_of
from pipeline.pinned import DamagedError, read_pinned
from pipeline.records import CommitRecord, DataFile, ShardSpec
from pipeline.sinks.parquet import frame_id, parse_parquet
from pipeline.sinks.png import compare_png_tree, png_keys
from pipeline.storage import StorageOptions, Store, open_store

_MOST_NAMED = 1000
_GENERATION = re.compile(r"gen-(\d{4,})/?")


@dataclass
class Findings:
    """What ``verify`` found.

    Attributes:
        url: The job's URI.
        num_shards: Shards of all generations, but for those that a repair replaced.
        num_decided: Those with a commit record.
        num_frames: Planned frames of the decided shards.
        num_rows: Rows found for them.
        undecided: Ids of those without one, by generation; no fault while the job is unfinished.
        orphans: Data objects that no record names; harmless, a resume collects them.
        replaced: Shards that a repair replaced; nobody reads them any more.
        broken: ``(generation, shard_id)`` of what a repair has to do anew.
        bad_pngs: Keys of PNGs that are missing or show other things than the data, with the
            ``(generation, shard_id)`` that they are made from.
        faults: One line each; the first thousand.
        num_faults: All of them.
    """

    url: str
    num_shards: int = 0
    num_decided: int = 0
    num_frames: int = 0
    num_rows: int = 0
    undecided: dict[int, list[int]] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    replaced: int = 0
    broken: set[tuple[int, int]] = field(default_factory=set)
    bad_pngs: dict[str, tuple[int, int]] = field(default_factory=dict)
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
        if self.replaced:
            lines.append(f"{self.replaced} shards were broken once and are replaced")
        lines += self.faults
        if self.num_faults > len(self.faults):
            lines.append(f"and {self.num_faults - len(self.faults)} more")
        return "\n".join(lines)


def verify_job(url: str, storage: StorageOptions) -> Findings:
    """Read the plan, every commit record, every byte of every data object that one names, and PNGs.

    Finds objects that are missing, of another size or of other content; rows that are missing,
    twice or not planned; records, data and shards that are not the plan's; a sealed manifest that
    says other things than the records; PNGs that show other things than the data.

    Raises:
        UserError: If there is no job, or no plan yet.
    """
    store = open_store(url, storage)
    job = read_job(store)
    plans = read_plans(store)
    if not plans:
        message = f"{store.url}: nothing to verify, the job is not planned yet"
        raise UserError(message)
    hidden = hidden_shards(plans)
    findings = Findings(url=store.url, replaced=sum(map(len, hidden)))
    is_finished = store.exists(plans[-1][0].success_key)
    with Progress("verifying", sum(plan.num_frames for _, plan in plans)) as progress:
        for generation, plan in plans:
            checked = _Generation(
                store=store,
                job=job,
                generation=generation,
                plan=plan,
                hidden=hidden[generation.number],
                is_newest=generation == plans[-1][0],
                is_finished=is_finished or store.exists(generation.success_key),
                findings=findings,
            )
            checked.check(progress)
    for key, (_, shard_id) in sorted(findings.bad_pngs.items()):
        findings.fault(f"{key}: missing, or not what the data of shard {shard_id} shows")
    _check_folders(store, len(plans), findings)
    check_job(store, job, findings.fault)
    return findings


def _check_folders(store: Store, num_plans: int, findings: Findings) -> None:
    """A plan that was lost takes all that was made from it out of its readers' sight."""
    for folder in store.list_folders(""):
        match = _GENERATION.fullmatch(folder)
        if match is None or int(match[1]) < num_plans:
            continue
        lost = Generation(int(match[1]))
        has_records = next(iter(store.list(lost.commit_prefix)), None) is not None
        # In this order: it may have been planned since.
        if has_records and (lost.number > num_plans or not store.exists(lost.plan_key)):
            findings.fault(f"{lost.plan_key}: missing, though records were committed for it")


@dataclass(frozen=True, kw_only=True)
class _Generation:
    """One generation to be checked, but for its hidden shards."""

    store: Store
    job: JobRecord
    generation: Generation
    plan: Plan
    hidden: frozenset[int]
    is_newest: bool
    is_finished: bool
    findings: Findings
    unreadable: set[int] = field(default_factory=set)

    def check(self, progress: Progress) -> None:
        """Check everything."""
        findings, number = self.findings, self.generation.number
        records = self._records()
        self._check_snapshot(records)
        findings.num_shards += self.plan.num_shards - len(self.hidden)
        findings.num_decided += len(records)
        undecided: list[int] = []
        with_pngs = self._with_pngs()
        digest = PlanDigest()
        for spec in self._planned():
            digest.add(spec)
            progress.advance(spec.num_frames)
            if spec.shard_id in self.hidden:
                continue
            self._void_older_pngs(spec)
            record = records.get(spec.shard_id)
            if record is not None:
                self._check_shard(spec, record, has_pngs=spec.shard_id in with_pngs)
            elif (number, spec.shard_id) in findings.broken:
                continue
            elif self.is_newest or spec.shard_id in self.unreadable:
                undecided.append(spec.shard_id)
            else:
                # Nobody works at an older generation: whoever planned a newer one left nothing.
                key = self.generation.commit_key(spec.shard_id)
                self._break(spec.shard_id, f"{key}: missing")
        if undecided:
            findings.undecided[number] = undecided
        if digest.plan_id != self.plan.plan_id:
            findings.fault(f"{self.generation.plan_key}: its parts hold another plan than it names")
        self._check_orphans(records)
        check_generation(
            self.store,
            self.generation,
            self.plan,
            records,
            self.job,
            findings.fault,
            self._break,
            hidden=self.hidden,
        )

    def _break(self, shard_id: int, message: str) -> None:
        """Note a fault that doing the shard anew mends."""
        self.findings.broken.add((self.generation.number, shard_id))
        self.findings.fault(message)

    def _records(self) -> dict[int, CommitRecord]:
        """The commit records themselves, whatever a snapshot says of them."""
        keys: list[str] = []
        for item in self.store.list(self.generation.commit_prefix):
            shard_id = shard_of(item.key)
            known = shard_id is not None and shard_id < self.plan.num_shards
            if not known or item.key != self.generation.commit_key(shard_id or 0):
                self.findings.fault(f"{item.key}: not a commit record of this plan")
            elif shard_id not in self.hidden:
                keys.append(item.key)
        records: dict[int, CommitRecord] = {}
        for key, data in self.store.read_many(keys):
            shard_id = shard_of(key) or 0
            if isinstance(data, StorageError):
                self.unreadable.add(shard_id)
                self.findings.fault(f"{key}: {data}")
                continue
            try:
                records[shard_id] = parse_commit(data, self.plan.plan_id, shard_id)
            except JobError as error:
                self._break(shard_id, f"{key}: {error}")
        return records

    def _check_snapshot(self, records: dict[int, CommitRecord]) -> None:
        """What readers go by must be what the records say."""
        plan = self.plan
        try:
            manifest = Manifest.load(self.store, self.generation, plan.plan_id, plan.num_shards)
            sealed = list(replace(manifest, open_ids=()).records(without=self.hidden))
        except (JobError, StorageError) as error:
            self.findings.fault(f"{MANIFEST_PREFIX}: {error}")
            return
        for record in sealed:
            if records.get(record.shard_id) != record:
                key = self.generation.commit_key(record.shard_id)
                message = f"{key}: missing, or not what the sealed manifest says"
                self._break(record.shard_id, message)

    def _planned(self) -> Iterator[ShardSpec]:
        for part in self.plan.parts:
            try:
                shards = read_part(self.store, part)
            except (JobError, StorageError) as error:
                self.findings.fault(str(error))
                continue
            yield from shards

    def _with_pngs(self) -> set[int | None]:
        """Shards whose PNGs are said to be complete."""
        if not self._wants_pngs:
            return set()
        return {shard_of(item.key) for item in self.store.list(self.generation.png_done_prefix)}

    @property
    def _wants_pngs(self) -> bool:
        return self.job.identity.get("output.png") is True

    def _check_shard(self, spec: ShardSpec, record: CommitRecord, *, has_pngs: bool) -> None:
        planned = [
            frame_id(part.asset, index) for part in spec.slices for index in part.frame_index
        ]
        self.findings.num_frames += len(planned)
        if self._wants_pngs and self.is_finished and not has_pngs:
            self.findings.fault(f"shard {spec.shard_id}: finished without the marker of its PNGs")
        held: list[str] = []
        num_ok = 0
        for file in record.files:
            key = f"{self.generation.prefix}{file.path}"
            try:
                data = read_pinned(self.store, key, file.sha256)
                _check_size(key, data, file)
                rows = _rows(key, data)
            except ObjectNotFoundError:
                self._break(spec.shard_id, f"{key}: missing")
                return
            except DamagedError as error:
                self._break(spec.shard_id, str(error))
                return
            except StorageError as error:
                self.findings.fault(f"{key}: cannot be read: {error}")
                return
            check_rows(key, data, record, functools.partial(self._break, spec.shard_id))
            if has_pngs:
                with_errors(
                    f"PNGs of shard {spec.shard_id}",
                    functools.partial(self._compare_pngs, spec.shard_id, data),
                    self.findings.fault,
                )
            held += [name for name, _ in rows]
            num_ok += sum(status == "ok" for _, status in rows)
        self.findings.num_rows += len(held)
        self._compare(spec.shard_id, planned, held)
        if (record.num_rows, record.num_ok) != (len(held), num_ok):
            message = "its record counts other rows than its data holds"
            self._break(spec.shard_id, f"shard {spec.shard_id}: {message}")

    def _compare_pngs(self, shard_id: int, data: bytes) -> None:
        anew = self.generation.number > 0
        for key, is_right in compare_png_tree(self.store, data, anew=anew):
            if not is_right:
                self.findings.bad_pngs[key] = self.generation.number, shard_id

    def _void_older_pngs(self, spec: ShardSpec) -> None:
        """What an older generation says of a frame's PNGs does not count any more.

        Nor does it while this one has not made them: then they may be of either, or half of each.
        """
        if not self.findings.bad_pngs:
            return
        for asset, index in frames_of([spec]):
            for key in png_keys(asset, index):
                self.findings.bad_pngs.pop(key, None)

    def _compare(self, shard_id: int, planned: list[str], held: list[str]) -> None:
        wanted, found = Counter(planned), Counter(held)
        for name, number in (
            ("missing", (wanted - found).total()),
            ("extra", (found - wanted).total()),
        ):
            if number:
                self._break(shard_id, f"shard {shard_id}: {number} rows {name}")

    def _check_orphans(self, records: dict[int, CommitRecord]) -> None:
        prefix = self.generation.prefix
        named = {f"{prefix}{file.path}" for record in records.values() for file in record.files}
        for item in self.store.list(self.generation.data_prefix):
            if item.key in named:
                continue
            attempt = attempt_of(item.key)
            if attempt is None or attempt[0] >= self.plan.num_shards:
                self.findings.fault(f"{item.key}: foreign object among the data")
            elif attempt[0] not in self.hidden:
                self.findings.orphans.append(item.key)


def _check_size(key: str, data: bytes, file: DataFile) -> None:
    if len(data) != file.size_bytes:
        message = f"{key}: {len(data)} bytes, its record says {file.size_bytes}"
        raise DamagedError(message)


def _rows(key: str, data: bytes) -> list[tuple[str, str]]:
    """``(frame_id, status)`` of every row.

    Raises:
        DamagedError: It is no Parquet with them.
    """
    try:
        table = parse_parquet(data, ["frame_id", "status"])
        return list(zip(table["frame_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    except (KeyError, ValueError) as error:
        raise DamagedError(f"{key}: {error}") from error
