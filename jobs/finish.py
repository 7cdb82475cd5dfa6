"""The end of a generation: delete what lost, count what there is, say that it is complete."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from jobs.digests import fixed_digests
from jobs.generations import Quarantined
from jobs.plan import Plan, is_part_key
from pipeline.layout import Generation, attempt_of
from pipeline.records import CommitRecord, canonical_json
from pipeline.storage import Store, create_once


def collect_orphans(
    store: Store, generation: Generation, plan: Plan, records: Sequence[CommitRecord]
) -> int:
    """Delete data of decided shards that lost, and plan parts that no plan names.

    An attempt of an undecided shard may still win: it is never touched.

    Returns:
        How many objects were deleted.
    """
    winners = {record.shard_id: record.attempt for record in records}
    named = {part.key for part in plan.parts}
    orphans = []
    # Exact keys only: a folder in here may be a link to somewhere else.
    for item in store.list(generation.data_prefix):
        attempt = attempt_of(item.key)
        if attempt is None or item.key != generation.data_key(*attempt):
            continue
        if attempt[0] in winners and winners[attempt[0]] != attempt[1]:
            orphans.append(item.key)
    orphans += [
        item.key
        for item in store.list(generation.plan_prefix)
        if is_part_key(generation, item.key) and item.key not in named
    ]
    store.delete(orphans)
    return len(orphans)


def write_success(
    store: Store, generation: Generation, plan: Plan, records: Sequence[CommitRecord]
) -> None:
    """Say that the generation is complete; the same content whoever writes it."""
    summary = summarise(plan, records) | {"sha256": fixed_digests(store, generation, plan)}
    create_once(store, generation.success_key, canonical_json(summary))


def summarise(plan: Plan, records: Collection[CommitRecord]) -> dict[str, Any]:
    """What the success marker counts of a generation."""
    return {
        "plan_id": plan.plan_id,
        "num_shards": plan.num_shards,
        "num_rows": sum(record.num_rows for record in records),
        "num_ok": sum(record.num_ok for record in records),
        "quarantined": count_kinds(item for record in records for item in record.quarantined),
    }


def count_kinds(quarantined: Iterable[Quarantined]) -> dict[str, int]:
    """How many frames each kind of error took."""
    return dict(Counter(kind for _, _, kind, _ in quarantined))
