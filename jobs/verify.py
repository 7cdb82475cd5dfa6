"""Check a job against itself: plan, commit records, data objects, rows."""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from jobs.findings import MOST_NAMED, Findings
from jobs.generations import hidden_shards, read_part, read_plans
from jobs.integrity import check_generation, check_job, check_rows, with_errors
from jobs.manifest import best_snapshot, sealed_records
from jobs.plan import Plan, PlanDigest, is_part_key
from jobs.png_tree import PngTree
from jobs.progress import Progress
from jobs.record import JobRecord, read_job
from pipeline.commit import parse_commit
from pipeline.errors import JobError, ObjectNotFoundError, StorageError, UserError
from pipeline.layout import MANIFEST_PREFIX, PNG_PREFIX, Generation, attempt_of, shard_of
from pipeline.pinned import DamagedError, read_pinned
from pipeline.records import CommitRecord, DataFile, ShardSpec
from pipeline.sinks.parquet import frame_id, parse_parquet
from pipeline.storage import StorageOptions, Store, open_store

_GENERATION = re.compile(r"gen-(\d{4,})/?")


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
    pngs = PngTree(store, findings.bad_pngs)
    newest = plans[-1][0]
    is_finished = store.exists(newest.success_key)
    with Progress("verifying", sum(plan.num_frames for _, plan in plans)) as progress:
        for generation, plan in plans:
            checked = _Generation(
                store=store,
                job=job,
                generation=generation,
                plan=plan,
                hidden=hidden[generation.number],
                is_newest=generation == newest,
                is_finished=is_finished,
                findings=findings,
                pngs=pngs,
            )
            checked.check(progress)
    with_errors(PNG_PREFIX, lambda: _void_by_newer(pngs, len(plans)), findings.fault)
    for key, (_, shard_id) in sorted(findings.bad_pngs.items()):
        findings.fault(f"{key}: missing, or not what the data of shard {shard_id} shows")
    if is_finished and pngs.num_compared == findings.num_shards:
        with_errors(PNG_PREFIX, lambda: _check_tree(pngs, len(plans), findings), findings.fault)
    _check_folders(store, len(plans), findings)
    check_job(store, job, findings.fault)
    # Once more: it may have been finished meanwhile.
    findings.is_finished = is_finished or store.exists(newest.success_key)
    return findings


def _void_by_newer(pngs: PngTree, num_plans: int) -> None:
    """PNGs that a generation makes, or deletes, that was planned since are its own business."""
    for _, plan in read_plans(pngs.store)[num_plans:]:
        for part in plan.parts:
            for spec in read_part(pngs.store, part):
                pngs.void(spec)


def _check_tree(pngs: PngTree, num_plans: int, findings: Findings) -> None:
    """Whoever reads pictures by their names would take a foreign one for the job's."""
    foreign = list(islice(pngs.foreign(), MOST_NAMED))
    # Looked at after that: what is foreign now may be of a generation that was planned since.
    if not pngs.store.exists(Generation(num_plans).plan_key):
        for key in foreign:
            findings.fault(f"{key}: foreign object among the PNGs")


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
    pngs: PngTree
    unreadable: set[int] = field(default_factory=set)

    def check(self, progress: Progress) -> None:
        """Check everything."""
        findings, number = self.findings, self.generation.number
        # In this order: while a driver is at work there can only be more records than they say.
        success, sealed = self._success(), self._sealed()
        records = self._records()
        self._check_sealed(sealed, records)
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
            self.pngs.void(spec)
            record = records.get(spec.shard_id)
            if record is not None:
                has_pngs = spec.shard_id in with_pngs
                if self._wants_pngs and not has_pngs:
                    self._note_without_pngs(spec.shard_id, is_finished=success is not None)
                self._check_shard(spec, record, has_pngs=has_pngs)
            elif self._is_undecided(spec.shard_id):
                undecided.append(spec.shard_id)
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
            success,
            findings.fault,
            self._break,
            hidden=self.hidden,
        )

    def _break(self, shard_id: int, message: str, *, unread: bool = False) -> None:
        """Note a fault that doing the shard anew mends."""
        if not unread:
            self.findings.broken.add((self.generation.number, shard_id))
        self.findings.fault(message, unread=unread)

    def _is_undecided(self, shard_id: int) -> bool:
        """Whether a shard without a record that can be understood is one that still may get one."""
        if (
            shard_id in self.unreadable
            or (self.generation.number, shard_id) in self.findings.broken
        ):
            return False
        # Nobody works at an older generation: whoever planned a newer one left nothing.
        return self.is_newest or not self._is_lost(shard_id)

    def _is_lost(self, shard_id: int) -> bool:
        """Note that a record is missing, unless it came after the others were listed."""
        key = self.generation.commit_key(shard_id)
        try:
            if self.store.exists(key):
                return False
        except StorageError as error:
            self._break(shard_id, f"{key}: cannot be read: {error}", unread=True)
            self.unreadable.add(shard_id)
            return True
        self._break(shard_id, f"{key}: missing")
        return True

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
                self.findings.fault(f"{key}: cannot be read: {data}", unread=True)
                continue
            try:
                records[shard_id] = parse_commit(data, self.plan.plan_id, shard_id)
            except JobError as error:
                self._break(shard_id, f"{key}: {error}")
        return records

    def _success(self) -> bytes | None:
        """The generation's success marker; None if there is none."""
        found: list[bytes] = []
        key = self.generation.success_key

        def read() -> None:
            with suppress(ObjectNotFoundError):
                found.append(self.store.read(key))

        with_errors(key, read, self.findings.fault)
        return found[0] if found else None

    def _sealed(self) -> list[CommitRecord]:
        """What readers go by."""
        found: list[CommitRecord] = []

        def read() -> None:
            plan, fault = self.plan, self.findings.fault
            given = self.store, self.generation, plan.plan_id, plan.num_shards
            _, table = best_snapshot(*given, on_damage=fault)
            found.extend(sealed_records(table, plan.plan_id, self.hidden))

        with_errors(MANIFEST_PREFIX, read, self.findings.fault)
        return found

    def _check_sealed(
        self, sealed: Sequence[CommitRecord], records: Mapping[int, CommitRecord]
    ) -> None:
        """It must be what the records say."""
        for said in sealed:
            shard_id = said.shard_id
            if records.get(shard_id) == said or shard_id in self.unreadable:
                continue
            if shard_id in records or (self.generation.number, shard_id) in self.findings.broken:
                key = self.generation.commit_key(shard_id)
                self._break(shard_id, f"{key}: not what the sealed manifest says")
            else:
                self._is_lost(shard_id)

    def _planned(self) -> Iterator[ShardSpec]:
        for part in self.plan.parts:
            try:
                shards = read_part(self.store, part)
            except ObjectNotFoundError:
                self.findings.fault(f"{part.key}: missing")
            except StorageError as error:
                self.findings.fault(f"{part.key}: cannot be read: {error}", unread=True)
            except JobError as error:
                self.findings.fault(str(error))
            else:
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
        held: list[str] = []
        num_ok = 0
        for file in record.files:
            key = f"{self.generation.prefix}{file.path}"
            is_own = key == self.generation.data_key(spec.shard_id, record.attempt)
            if not is_own:
                self._break(spec.shard_id, f"{key}: not the data of its record's attempt")
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
                self.findings.fault(f"{key}: cannot be read: {error}", unread=is_own)
                return
            check_rows(key, data, record, functools.partial(self._break, spec.shard_id))
            if has_pngs:
                with_errors(
                    f"PNGs of shard {spec.shard_id}",
                    functools.partial(self.pngs.compare, self.generation, spec.shard_id, data),
                    self.findings.fault,
                )
            held += [name for name, _ in rows]
            num_ok += sum(status == "ok" for _, status in rows)
        self.findings.num_rows += len(held)
        self._compare(spec.shard_id, planned, held)
        if (record.num_rows, record.num_ok) != (len(held), num_ok):
            message = "its record counts other rows than its data holds"
            self._break(spec.shard_id, f"shard {spec.shard_id}: {message}")

    def _note_without_pngs(self, shard_id: int, *, is_finished: bool) -> None:
        if is_finished or self.is_finished:
            self.findings.fault(f"shard {shard_id}: finished without the marker of its PNGs")
        else:
            self.findings.num_without_pngs += 1

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
            is_own = attempt is not None and item.key == self.generation.data_key(*attempt)
            if attempt is None or not is_own or attempt[0] >= self.plan.num_shards:
                self.findings.fault(f"{item.key}: foreign object among the data")
            elif attempt[0] not in self.hidden:
                self.findings.orphans.append(item.key)
        planned = {self.generation.plan_key, *(part.key for part in self.plan.parts)}
        for item in self.store.list(self.generation.plan_prefix):
            if item.key in planned:
                continue
            if is_part_key(self.generation, item.key):
                self.findings.orphans.append(item.key)
            else:
                self.findings.fault(f"{item.key}: foreign object beside the plan")


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
