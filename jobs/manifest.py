"""Which shards of a generation are decided, and by which attempt: the truth that readers go by.

A shard is decided when its commit record exists. Ranges of 1,000 shards that are all decided are
sealed: their records go into one snapshot table and their folders are never listed again.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import parse_commit
from pipeline.errors import DAMAGE, JobError, StorageError, one_line
from pipeline.layout import MANIFEST_PREFIX, SHARDS_PER_RANGE, Generation, shard_of
from pipeline.pinned import DamagedError
from pipeline.records import CommitRecord, DataFile
from pipeline.sinks.parquet import parse_parquet
from pipeline.storage import Store

_META = b"segformer3d-manifest"
_SNAPSHOT = re.compile(rf"{MANIFEST_PREFIX}snapshot-(\d{{4,}})-\d{{6,}}-[0-9a-f]{{12}}\.parquet")
_FILE = pa.struct([("path", pa.string()), ("size_bytes", pa.int64()), ("sha256", pa.string())])
_QUARANTINED = pa.struct(
    [
        ("asset", pa.string()),
        ("frame_index", pa.int64()),
        ("kind", pa.string()),
        ("reason", pa.string()),
    ]
)
SNAPSHOT_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.int64(), nullable=False),
        pa.field("attempt", pa.string(), nullable=False),
        pa.field("files", pa.list_(_FILE), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_ok", pa.int64(), nullable=False),
        pa.field("quarantined", pa.list_(_QUARANTINED), nullable=False),
    ]
)
_NOTHING_SEALED = SNAPSHOT_SCHEMA.empty_table()


@dataclass(frozen=True)
class Manifest:
    """A look at a generation's commit records.

    Attributes:
        store: The job's store.
        generation: Which generation.
        plan_id: Its plan.
        num_shards: Shards of that plan.
        sealed_ranges: Ranges that the snapshot answers for.
        sealed: Their records, as a table of ``SNAPSHOT_SCHEMA``.
        open_ids: Decided shards outside the sealed ranges, sorted.
    """

    store: Store
    generation: Generation
    plan_id: str
    num_shards: int
    sealed_ranges: frozenset[int]
    sealed: pa.Table
    open_ids: tuple[int, ...]

    @classmethod
    def load(cls, store: Store, generation: Generation, plan_id: str, num_shards: int) -> Self:
        """List what is not sealed.

        A file that somebody else left among the records is not one: `verify` names it.

        Raises:
            JobError: If a record lies outside the plan.
            StorageError: If the store cannot be listed.
        """
        sealed_ranges, sealed = best_snapshot(store, generation, plan_id, num_shards)
        open_ids: set[int] = set()
        for range_id in range(_num_ranges(num_shards)):
            if range_id in sealed_ranges:
                continue
            for item in store.list(generation.range_prefix(range_id)):
                shard_id = shard_of(item.key)
                if shard_id is None or item.key != generation.commit_key(shard_id):
                    continue
                if shard_id >= num_shards:
                    message = f"{item.key} does not belong to this plan; run `verify`"
                    raise JobError(message)
                open_ids.add(shard_id)
        return cls(
            store=store,
            generation=generation,
            plan_id=plan_id,
            num_shards=num_shards,
            sealed_ranges=sealed_ranges,
            sealed=sealed,
            open_ids=tuple(sorted(open_ids)),
        )

    @property
    def num_done(self) -> int:
        """Decided shards."""
        return int(self.sealed.num_rows) + len(self.open_ids)

    @property
    def is_complete(self) -> bool:
        """Whether every planned shard is decided."""
        return self.num_done == self.num_shards

    def done(self) -> npt.NDArray[np.bool_]:
        """One flag per shard of the plan."""
        flags = np.zeros(self.num_shards, np.bool_)
        flags[np.array(self.sealed["shard_id"].to_pylist(), np.int64)] = True
        flags[np.array(self.open_ids, np.int64)] = True
        return flags

    def records(self, without: Collection[int] = ()) -> Iterator[CommitRecord]:
        """Every commit record: the sealed ones first, then the open ones as they are read.

        Args:
            without: Shards whose records are not even read.

        Raises:
            JobError: If a record is malformed or foreign.
            StorageError: If one cannot be read.
        """
        yield from sealed_records(self.sealed, self.plan_id, without)
        yield from self._read([item for item in self.open_ids if item not in without])

    def seal(self) -> Self:
        """Move ranges that are all decided into a new snapshot; safe to repeat and to race."""
        ready = _complete_ranges(self.open_ids, self.num_shards)
        if not ready:
            return self
        moved = [item for item in self.open_ids if item // SHARDS_PER_RANGE in ready]
        rows = [_row(record) for record in self._read(moved)]
        added = pa.Table.from_pylist(rows, schema=SNAPSHOT_SCHEMA)
        table = pa.concat_tables([self.sealed, added]).sort_by("shard_id")
        ranges = self.sealed_ranges | ready
        _write_snapshot(self.store, self.generation, self.plan_id, ranges, table)
        rest = tuple(item for item in self.open_ids if item // SHARDS_PER_RANGE not in ready)
        return type(self)(
            self.store, self.generation, self.plan_id, self.num_shards, ranges, table, rest
        )

    def _read(self, shard_ids: Sequence[int]) -> Iterator[CommitRecord]:
        keys = [self.generation.commit_key(shard_id) for shard_id in shard_ids]
        for shard_id, (_, data) in zip(shard_ids, self.store.read_many(keys), strict=True):
            if isinstance(data, StorageError):
                raise data
            yield parse_commit(data, self.plan_id, shard_id)


def _num_ranges(num_shards: int) -> int:
    return -(-num_shards // SHARDS_PER_RANGE)


def _complete_ranges(open_ids: Sequence[int], num_shards: int) -> frozenset[int]:
    if not open_ids:
        return frozenset()
    counts = np.bincount(np.array(open_ids, np.int64) // SHARDS_PER_RANGE)
    sizes = np.minimum(SHARDS_PER_RANGE, num_shards - np.arange(len(counts)) * SHARDS_PER_RANGE)
    return frozenset(np.flatnonzero((counts == sizes) & (counts > 0)).tolist())


def best_snapshot(
    store: Store,
    generation: Generation,
    plan_id: str,
    num_shards: int,
    on_damage: Callable[[str], None] = lambda _: None,
) -> tuple[frozenset[int], pa.Table]:
    """The snapshot that readers go by: its ranges, and their records as ``SNAPSHOT_SCHEMA``.

    A damaged one is passed over, as it only says again what the records say; ``on_damage`` is told.

    Raises:
        JobError: If it belongs to another plan.
        StorageError: If it cannot be read.
    """
    for key in reversed(_snapshot_keys(store, generation)):
        try:
            return _parse_snapshot(key, store.read(key), plan_id, num_shards)
        except DamagedError as error:
            on_damage(str(error))
    return frozenset(), _NOTHING_SEALED


def sealed_records(
    sealed: pa.Table, plan_id: str, without: Collection[int] = ()
) -> Iterator[CommitRecord]:
    """The records in a snapshot's table, but those of some shards."""
    for rows in sealed.to_batches():
        kept = (item for item in rows.to_pylist() if item["shard_id"] not in without)
        yield from (_record(item, plan_id) for item in kept)


def _parse_snapshot(
    key: str, data: bytes, plan_id: str, num_shards: int
) -> tuple[frozenset[int], pa.Table]:
    # Before Parquet's reader sees it: damage need not make it unreadable.
    if not key.endswith(f"-{_digest(data)}.parquet"):
        raise DamagedError(f"{key}: other content than its name says")
    try:
        table = parse_parquet(data)
        meta = json.loads(table.schema.metadata[_META])
        ranges, owner = frozenset(int(item) for item in meta["ranges"]), meta["plan_id"]
        table = table.replace_schema_metadata(None)
        if table.schema != SNAPSHOT_SCHEMA:
            table = table.cast(SNAPSHOT_SCHEMA)
    except (pa.ArrowException, *DAMAGE) as error:
        raise DamagedError(f"{key}: no snapshot: {one_line(str(error))}") from error
    if owner != plan_id:
        message = f"{key} belongs to another plan; run `verify`"
        raise JobError(message)
    if not _holds_exactly(table, ranges, num_shards):
        raise DamagedError(f"{key}: holds other shards than those of its ranges")
    return ranges, table


def _holds_exactly(table: pa.Table, ranges: frozenset[int], num_shards: int) -> bool:
    """Whether a snapshot has one record, and no more, of every shard of its ranges."""
    if not all(0 <= item < _num_ranges(num_shards) for item in ranges):
        return False
    if any(column.null_count for column in table.columns):
        return False
    starts = np.array(sorted(ranges), np.int64)[:, None] * SHARDS_PER_RANGE
    expected = (starts + np.arange(SHARDS_PER_RANGE)).ravel()
    held = np.sort(table["shard_id"].to_numpy())
    return np.array_equal(held, expected[expected < num_shards])


def _snapshot_keys(store: Store, generation: Generation) -> list[str]:
    """Keys of a generation's snapshots, the one that readers look at first last."""
    keys = (item.key for item in store.list(MANIFEST_PREFIX))
    return sorted(key for key in keys if _generation_of(key) == generation.number)


def _generation_of(key: str) -> int | None:
    """The generation of a snapshot; None for any other key, also of one below a folder in here."""
    match = _SNAPSHOT.fullmatch(key)
    return int(match[1]) if match else None


def _write_snapshot(
    store: Store, generation: Generation, plan_id: str, ranges: frozenset[int], table: pa.Table
) -> None:
    meta = json.dumps({"plan_id": plan_id, "ranges": sorted(ranges)}).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_META: meta}), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name = f"snapshot-{generation.number:04d}-{len(ranges):06d}-{_digest(data)}.parquet"
    store.put(f"{MANIFEST_PREFIX}{name}", data)


def drop_damaged_snapshots(
    store: Store, generation: Generation, plan_id: str, num_shards: int
) -> list[str]:
    """Delete the snapshots of a generation that nobody goes by; the records tell the same, slower.

    Returns:
        Their keys.
    """
    damaged = [
        key
        for key, data in store.read_many(_snapshot_keys(store, generation))
        if not isinstance(data, StorageError) and _is_damaged(key, data, plan_id, num_shards)
    ]
    store.delete(damaged)
    return damaged


def _is_damaged(key: str, data: bytes, plan_id: str, num_shards: int) -> bool:
    try:
        _parse_snapshot(key, data, plan_id, num_shards)
    except DamagedError:
        return True
    except JobError:
        # Another plan's is for a person to look at.
        return False
    return False


def _digest(data: bytes) -> str:
    """What a snapshot's name says of its content."""
    return hashlib.sha256(data).hexdigest()[:12]


def _row(record: CommitRecord) -> dict[str, Any]:
    return {
        "shard_id": record.shard_id,
        "attempt": record.attempt,
        "files": [
            {"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256}
            for file in record.files
        ],
        "num_rows": record.num_rows,
        "num_ok": record.num_ok,
        "quarantined": [
            dict(zip(("asset", "frame_index", "kind", "reason"), item, strict=True))
            for item in record.quarantined
        ],
    }


def _record(row: dict[str, Any], plan_id: str) -> CommitRecord:
    return CommitRecord(
        shard_id=row["shard_id"],
        plan_id=plan_id,
        attempt=row["attempt"],
        files=tuple(DataFile(**item) for item in row["files"]),
        num_rows=row["num_rows"],
        num_ok=row["num_ok"],
        quarantined=tuple(
            (item["asset"], item["frame_index"], item["kind"], item["reason"])
            for item in row["quarantined"]
        ),
    )
