"""An attempt at a shard becomes a fact: data under a key of its own, then one create-only record.

The record's creation is the linearization point. Whatever happens before it leaves only an orphan
that nobody sees; whatever happens after it can be repeated.
"""

import hashlib
import uuid

from pipeline.errors import JobError
from pipeline.layout import Generation
from pipeline.records import CommitRecord, DataFile, FrameRecord
from pipeline.storage import Store, create_once


def commit_attempt(
    store: Store,
    generation: Generation,
    plan_id: str,
    shard_id: int,
    frames: tuple[FrameRecord, ...],
    data: bytes,
) -> tuple[CommitRecord, bool]:
    """Write one attempt's data and try to make it the shard's.

    The attempt's name is minted here, inside the call: Ray may run a task again with the same
    arguments, and two runs must never share a key.

    Args:
        store: The job's store.
        generation: The generation that holds the plan.
        plan_id: The plan's identity.
        shard_id: The shard.
        frames: Every planned frame of it with its outcome.
        data: Bytes of the Parquet object.

    Returns:
        The record that counts, and whether it is this attempt's.

    Raises:
        StorageError: If the store cannot say whether the record exists; nothing is decided then.
        JobError: If the record that exists belongs to another plan.
    """
    attempt = uuid.uuid4().hex
    data_key = generation.data_key(shard_id, attempt)
    record = CommitRecord(
        shard_id=shard_id,
        plan_id=plan_id,
        attempt=attempt,
        files=(
            DataFile(
                path=data_key.removeprefix(generation.prefix),
                size_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            ),
        ),
        num_rows=len(frames),
        num_ok=sum(frame.error_kind is None for frame in frames),
        quarantined=tuple(
            (frame.asset, frame.frame_index, frame.error_kind, frame.error or "")
            for frame in frames
            if frame.error_kind is not None
        ),
    )
    store.put(data_key, data)
    mine = record.to_json()
    held = create_once(store, generation.commit_key(shard_id), mine)
    if held == mine:
        return record, True
    store.delete([data_key])
    return parse_commit(held, plan_id, shard_id), False


def parse_commit(data: bytes, plan_id: str, shard_id: int) -> CommitRecord:
    """A commit record that was read, checked against the plan.

    Raises:
        JobError: If it is malformed, or another plan's or another shard's.
    """
    try:
        record = CommitRecord.from_json(data)
    except ValueError as error:
        message = f"commit record of shard {shard_id} is malformed: {error}; run `verify`"
        raise JobError(message) from error
    if (record.plan_id, record.shard_id) != (plan_id, shard_id):
        message = (
            f"commit record of shard {shard_id} names plan {record.plan_id[:12]} "
            f"shard {record.shard_id}, expected plan {plan_id[:12]}; run `verify`"
        )
        raise JobError(message)
    return record
