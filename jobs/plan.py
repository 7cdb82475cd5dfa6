"""What a generation will do: the immutable list of its shards, as `plan.json` holds it.

The plan's identity is a hash over the shards; where the archive lies is not part of it.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, Self

from pipeline.errors import DAMAGE, JobError, ObjectNotFoundError
from pipeline.layout import Generation
from pipeline.records import ShardSpec, canonical_json
from pipeline.storage import Store
from pipeline.typed import KNOWN_FIELDS_ONLY, from_json

Reason = Literal["first", "retry", "repair"]

# No version puts more shards into a part. A hundred million of them are six billion frames.
_MOST_SHARDS = 1000
_MOST_PARTS = 100_000
_MAX_BYTES = 64 << 20
_PART_KEY = re.compile(r"gen-\d{4,}/plan/part-\w+-\d{5,}\.parquet", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """One Parquet object of a plan: the shards of one range.

    Attributes:
        key: Its key within the job.
        first_shard: Its first shard.
        num_shards: How many it holds.
        sha256: Hex digest of its bytes; None in plans of before 2026-11-26.
    """

    key: str
    first_shard: int
    num_shards: int
    sha256: str | None = None

    __pydantic_config__ = KNOWN_FIELDS_ONLY


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``plan.json`` holds.

    Attributes:
        plan_id: Hash over the ordered shards.
        num_shards: Shards.
        num_frames: Planned frames, each of which ends with exactly one outcome.
        num_known_errors: Those of them that the planner already knows to be unreadable.
        num_images: Images of the archive.
        num_videos: Videos of the archive.
        num_ignored: Other files there.
        size_bytes: Size of all assets.
        video_duration_s: Play time of all videos.
        num_pixels: Model input pixels over all planned frames.
        parts: The shards themselves.
        reason: Why there is this generation.
        only: Of a retry, the kinds of error that it was asked to try again; empty for all.
        replaced: Of a repair, ``(generation, shard_id)`` of what nobody shall read any more.
        reopened: Tars that were read anew; what an older generation said of them is void.
    """

    plan_id: str
    num_shards: int
    num_frames: int
    num_known_errors: int
    num_images: int
    num_videos: int
    num_ignored: int
    size_bytes: int
    video_duration_s: float
    num_pixels: int
    parts: tuple[PlanPart, ...] = ()
    reason: Reason = "first"
    only: tuple[str, ...] = ()
    replaced: tuple[tuple[int, int], ...] = ()
    reopened: tuple[str, ...] = ()

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """From the bytes of ``plan.json``.

        Raises:
            ValueError: If they are none, or its parts do not make up its shards.
        """
        plan = from_json(cls, data)
        if len(plan.parts) > _MOST_PARTS:
            message = f"it has {len(plan.parts)} parts, more than {_MOST_PARTS}"
            raise ValueError(message)
        first = 0
        for part in plan.parts:
            if not _PART_KEY.fullmatch(part.key):
                message = f"{part.key!r} is no key of a part"
                raise ValueError(message)
            if part.first_shard != first:
                message = f"{part.key} does not begin where the part before it ends"
                raise ValueError(message)
            if not 0 < part.num_shards <= _MOST_SHARDS:
                message = f"{part.key} cannot hold {part.num_shards} shards"
                raise ValueError(message)
            first += part.num_shards
        if first != plan.num_shards:
            message = f"num_shards is {plan.num_shards}, its parts hold {first}"
            raise ValueError(message)
        return plan


class PlanDigest:
    """The identity of a plan: a hash over its shards, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, shard: ShardSpec) -> None:
        """Take the next shard."""
        fields = shard.fields()
        # A moved archive is the same archive.
        del fields["root"]
        for part in fields["slices"]:
            if part["container"] is None:  # as in the plans that were made before there were tars
                del part["container"], part["offset"]
        self._hash.update(canonical_json(fields) + b"\n")

    @property
    def plan_id(self) -> str:
        """Of the shards so far."""
        return self._hash.hexdigest()


def read_plan(store: Store, generation: Generation) -> Plan | None:
    """The plan of a generation; None if it is not planned yet.

    Raises:
        JobError: If ``plan.json`` cannot be understood.
    """
    try:
        return Plan.from_json(store.read_small(generation.plan_key, _MAX_BYTES))
    except ObjectNotFoundError:
        return None
    except DAMAGE as error:
        message = f"{generation.plan_key} is malformed: {error}"
        raise JobError(message) from error


def is_part_key(generation: Generation, key: str) -> bool:
    """Whether a key is one that a planner of that generation may have given to a part."""
    return key.startswith(generation.prefix) and _PART_KEY.fullmatch(key) is not None
