"""The generations of a job taken together: which row of which generation is the one that counts.

A retry or a repair adds a generation that does some frames anew; everything else stays where it is.
The newest row of a frame counts. A row that says that an asset cannot be opened (frame index -1)
gives way to any newer row of that asset, and a tar's own to the generation that read it anew.
Shards that a repair replaced are not read any more.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from jobs.manifest import Manifest
from jobs.plan import Plan, PlanPart, read_plan
from pipeline.errors import DAMAGE, JobError
from pipeline.layout import Generation
from pipeline.pinned import read_pinned
from pipeline.records import CommitRecord, ShardSpec
from pipeline.sinks.parquet import parse_parquet
from pipeline.storage import Store
from pipeline.tables import shards_from_table

UNOPENABLE = -1

Frames = Mapping[str, frozenset[int]]
Quarantined = tuple[str, int, str, str]


@dataclass(frozen=True)
class GenerationView:
    """One generation, seen from the newest.

    Attributes:
        store: The job's store.
        generation: Which generation.
        plan: Its plan.
        manifest: Its records.
        hidden: Shards that a later repair replaced.
        newer: The generations after it, oldest first.
    """

    store: Store
    generation: Generation
    plan: Plan
    manifest: Manifest
    hidden: frozenset[int]
    newer: "tuple[GenerationView, ...]"

    @property
    def num_shards(self) -> int:
        """Shards that still count."""
        return self.plan.num_shards - len(self.hidden)

    @property
    def num_done(self) -> int:
        """Those of them that are decided."""
        if not self.hidden:
            return self.manifest.num_done
        done = self.manifest.done()
        return self.manifest.num_done - sum(bool(done[shard_id]) for shard_id in self.hidden)

    @property
    def is_complete(self) -> bool:
        """Whether all of them are."""
        return self.num_done == self.num_shards

    @functools.cached_property
    def records(self) -> tuple[CommitRecord, ...]:
        """Commit records of the shards that count.

        Raises:
            JobError: If one is malformed or foreign.
            StorageError: If one cannot be read.
        """
        return tuple(self.manifest.records(without=self.hidden))

    @functools.cached_property
    def planned(self) -> Frames:
        """Every planned frame of the shards that count, by asset."""
        # What a tar that was read anew still lacks may be nothing.
        reopened: Frames = dict.fromkeys(self.plan.reopened, frozenset())
        return {**reopened, **by_asset(frames_of(self._shards()))}

    @functools.cached_property
    def decided(self) -> Frames:
        """Those of them in decided shards."""
        if self.is_complete:
            return self.planned
        done = self.manifest.done()
        return by_asset(frames_of(item for item in self._shards() if done[item.shard_id]))

    def counts(self, asset: str, frame_index: int) -> bool:
        """Whether no newer generation has decided that frame anew."""
        return not any(covers(view.decided, asset, frame_index) for view in self.newer)

    def quarantined(self) -> Iterator[Quarantined]:
        """Errors of this generation that no newer one has decided anew."""
        for record in self.records:
            for item in record.quarantined:
                if self.counts(item[0], item[1]):
                    yield item

    def _shards(self) -> Iterator[ShardSpec]:
        for part in self.plan.parts:
            for shard in read_part(self.store, part):
                if shard.shard_id not in self.hidden:
                    yield shard


@dataclass(frozen=True)
class History:
    """All generations of a job at one moment.

    Attributes:
        store: The job's store.
        views: Oldest first; empty before there is a plan.
    """

    store: Store
    views: tuple[GenerationView, ...]

    @classmethod
    def load(cls, store: Store) -> "History":
        """List the generations and what of them is decided.

        Raises:
            JobError: If a plan or a manifest cannot be understood.
            StorageError: If the store cannot be read.
        """
        views: tuple[GenerationView, ...] = ()
        plans = read_plans(store)
        hidden = hidden_shards(plans)
        for generation, plan in reversed(plans):
            manifest = Manifest.load(store, generation, plan.plan_id, plan.num_shards)
            view = GenerationView(
                store, generation, plan, manifest, hidden[generation.number], newer=views
            )
            views = (view, *views)
        return cls(store, views)

    @property
    def next_generation(self) -> Generation:
        """The one that is not planned yet."""
        return Generation(len(self.views))

    @property
    def is_complete(self) -> bool:
        """Whether every shard that counts is decided."""
        return bool(self.views) and all(view.is_complete for view in self.views)

    @property
    def num_shards(self) -> int:
        """Shards that count."""
        return sum(view.num_shards for view in self.views)

    @property
    def num_done(self) -> int:
        """Those of them that are decided."""
        return sum(view.num_done for view in self.views)

    @property
    def num_ok(self) -> int:
        """Frames annotated."""
        return sum(record.num_ok for view in self.views for record in view.records)

    def assets(self) -> frozenset[str]:
        """Paths of every asset that is planned in shards that count."""
        return frozenset(asset for view in self.views for asset in view.planned)

    def quarantined(self) -> Iterator[Quarantined]:
        """``(asset, frame_index, kind, reason)`` of every frame with an error."""
        for view in self.views:
            yield from view.quarantined()

    @functools.cached_property
    def num_quarantined(self) -> int:
        """Frames with an error."""
        return sum(1 for _ in self.quarantined())

    @property
    def num_frames(self) -> int:
        """Frames that have an outcome once every shard is decided."""
        *older, newest = self.views
        before = sum(_num_lasting(view) for view in older)
        return before + newest.plan.num_frames

    @property
    def size_bytes(self) -> int:
        """Bytes of the committed data objects that count."""
        return sum(
            file.size_bytes
            for view in self.views
            for record in view.records
            for file in record.files
        )


def read_plans(store: Store) -> list[tuple[Generation, Plan]]:
    """Every generation that is planned, oldest first; they are numbered without a gap.

    Raises:
        JobError: If a ``plan.json`` cannot be understood.
    """
    found: list[tuple[Generation, Plan]] = []
    while (plan := read_plan(store, Generation(len(found)))) is not None:
        found.append((Generation(len(found)), plan))
    return found


def read_part(store: Store, part: PlanPart) -> list[ShardSpec]:
    """The shards of one part of a plan.

    Raises:
        JobError: If it cannot be understood.
        StorageError: If it cannot be read.
    """
    return shards_of(part, read_part_table(store, part))


def read_part_table(store: Store, part: PlanPart) -> pa.Table:
    """The same, as the table that it is; ``shards_of`` makes shards of any rows of it."""
    try:
        return parse_parquet(read_pinned(store, part.key, part.sha256))
    except ValueError as error:
        raise _unreadable(part, error) from error


def shards_of(part: PlanPart, table: pa.Table) -> list[ShardSpec]:
    """The shards of some rows of a part.

    Raises:
        JobError: If they cannot be understood.
    """
    try:
        return shards_from_table(table)
    except (pa.ArrowException, *DAMAGE) as error:
        raise _unreadable(part, error) from error


def _unreadable(part: PlanPart, error: Exception) -> JobError:
    return JobError(f"{part.key}: cannot be read: {' '.join(str(error).split())}")


def hidden_shards(plans: list[tuple[Generation, Plan]]) -> list[frozenset[int]]:
    """By generation, the shards that later repairs replaced."""
    hidden: list[set[int]] = [set() for _ in plans]
    for generation, plan in plans:
        for number, shard_id in plan.replaced:
            is_older = 0 <= number < generation.number
            if not is_older or not 0 <= shard_id < plans[number][1].num_shards:
                message = f"{generation.plan_key} replaces a shard that no earlier plan has"
                raise JobError(message)
            hidden[number].add(shard_id)
    return [frozenset(item) for item in hidden]


def covers(frames: Frames, asset: str, frame_index: int) -> bool:
    """Whether a row of that frame gives way to rows of ``frames``."""
    held = frames.get(asset)
    return held is not None and (frame_index == UNOPENABLE or frame_index in held)


def by_asset(frames: Iterable[tuple[str, int]]) -> Frames:
    """Frame indices by asset, of ``(asset, frame_index)`` each."""
    found: dict[str, set[int]] = {}
    for asset, index in frames:
        found.setdefault(asset, set()).add(index)
    return {asset: frozenset(indices) for asset, indices in found.items()}


def frames_of(shards: Iterable[ShardSpec]) -> Iterator[tuple[str, int]]:
    """``(asset, frame_index)`` of every frame of some shards."""
    for shard in shards:
        for part in shard.slices:
            yield from ((part.asset, index) for index in part.frame_index)


def _num_lasting(view: GenerationView) -> int:
    """Rows of an older generation that stay once all newer ones are decided.

    A newer generation plans nothing but errors and the frames of shards that it hides.
    """
    gone = sum(
        any(covers(newer.planned, item[0], item[1]) for newer in view.newer)
        for record in view.records
        for item in record.quarantined
    )
    return sum(record.num_rows for record in view.records) - gone
