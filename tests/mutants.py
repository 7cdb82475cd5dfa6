"""The commit protocol, spoiled: the design's five mutants and more, each to be found out.

Each takes a ``MonkeyPatch`` and puts one mistake into the real code, or into the store.
"""

import uuid
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from uuid import UUID

import pytest

from jobs import lease, manifest, planner, runner
from jobs.plan import Plan
from pipeline import commit
from pipeline.errors import ObjectExistsError, StorageError, StoreUnavailableError
from pipeline.layout import Generation
from pipeline.records import CommitRecord, canonical_json
from pipeline.storage import Store, create_once
from tests.virtual_store import VirtualStore

GENERATION = Generation()
# No shard, as a record of shard 0.
NOTHING = CommitRecord(
    shard_id=0, plan_id="", attempt="", files=(), num_rows=0, num_ok=0, quarantined=()
)

Mutant = Callable[[pytest.MonkeyPatch], None]


def exists_then_put(patch: pytest.MonkeyPatch) -> None:
    def look_first(store: Store, key: str, data: bytes) -> bytes:
        if store.exists(key):
            return store.read(key)
        store.put(key, data)
        return data

    patch.setattr(commit, "create_once", look_first)


def same_data_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "uuid", SimpleNamespace(uuid4=lambda: UUID(int=0)))


def unconditional_put(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VirtualStore, "create", VirtualStore.put)


def trusted_refusal(patch: pytest.MonkeyPatch) -> None:
    def believe(store: Store, key: str, data: bytes) -> bytes:
        try:
            store.create(key, data)
        except ObjectExistsError:
            return store.read(key) + b" "  # what stands there, taken for another's unseen
        except StorageError:
            return create_once(store, key, data)
        return data

    patch.setattr(commit, "create_once", believe)


def collected_undecided(patch: pytest.MonkeyPatch) -> None:
    real = runner.collect_orphans

    def collect_all(
        store: Store, generation: Generation, plan: Plan, records: Sequence[CommitRecord]
    ) -> int:
        return real(store, generation, plan, [NOTHING, *records])

    patch.setattr(runner, "collect_orphans", collect_all)


def cleaned_in_doubt(patch: pytest.MonkeyPatch) -> None:
    def give_up(store: Store, key: str, data: bytes) -> bytes:
        try:
            return create_once(store, key, data, attempts=1)
        except StoreUnavailableError:
            files = CommitRecord.from_json(data).files
            store.delete(GENERATION.prefix + file.path for file in files)
            raise

    patch.setattr(commit, "create_once", give_up)


def uncollected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner, "collect_orphans", lambda *_: 0)


def put_lease(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease, "create_once", _put)


def put_plan(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planner, "create_once", _put)


def sealed_early(patch: pytest.MonkeyPatch) -> None:
    def begun(open_ids: Sequence[int], num_shards: int) -> frozenset[int]:
        return frozenset(shard_id // manifest.SHARDS_PER_RANGE for shard_id in open_ids)

    patch.setattr(manifest, "_complete_ranges", begun)


def signed_marker(patch: pytest.MonkeyPatch) -> None:
    def sign(
        store: Store, generation: Generation, plan: Plan, records: Sequence[CommitRecord]
    ) -> None:
        summary = {"num_shards": len(records), "by": uuid.uuid4().hex}
        create_once(store, generation.success_key, canonical_json(summary))

    patch.setattr(runner, "write_success", sign)


def _put(store: Store, key: str, data: bytes) -> bytes:
    store.put(key, data)
    return data
