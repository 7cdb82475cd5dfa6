"""``job.json``: the create-only object that says whose output this is.

It pins everything that decides the outputs, so that a resume with anything else is refused by name.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from jobs.spec import JobSpec, check_spec
from pipeline.errors import (
    ConflictError,
    JobError,
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
    UserError,
)
from pipeline.layout import JOB_KEY, LAYOUT_VERSION, OWN_PREFIXES, PROBE_PREFIX, WEIGHTS_PREFIX
from pipeline.records import canonical_json
from pipeline.storage import Store, create_once, probe_conditional_writes
from pipeline.typed import KNOWN_FIELDS_ONLY, from_json

# Changes only when the same inputs would give other outputs.
OUTPUT_VERSION = 4
# Some kilobytes, and what a job says of its archive.
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What ``job.json`` holds.

    Attributes:
        spec: The job as it was asked for.
        identity: The settings that decide the outputs, by dotted name.
        weights_sha256: Digest of the weights file, which lies beside the job.
        trained: False for weights that only show that everything runs.
        preprocessing: Mean, standard deviation and channel order of the weights.
        labels: Class names by train id.
        depth_codec: How depth codes read; None if the weights lack the head.
        output_version: ``OUTPUT_VERSION`` of the software that made the job.
        layout_version: ``LAYOUT_VERSION``, likewise.
        software_version: The version that made the job; for people.
    """

    spec: dict[str, Any]
    identity: dict[str, Any]
    weights_sha256: str
    trained: bool
    preprocessing: dict[str, Any]
    labels: list[str]
    depth_codec: dict[str, Any] | None
    output_version: int = OUTPUT_VERSION
    layout_version: int = LAYOUT_VERSION
    software_version: str = ""

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    @property
    def weights_key(self) -> str:
        """Where the job keeps its weights."""
        return f"{WEIGHTS_PREFIX}{self.weights_sha256}.safetensors"

    def job_spec(self) -> JobSpec:
        """The spec, checked again."""
        return check_spec(self.spec, JOB_KEY)

    def to_json(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Inverse of ``to_json``.

        Raises:
            JobError: If the bytes are no job record, or one of a newer version.
        """
        try:
            record = from_json(cls, data)
        except ValueError as error:
            message = f"{JOB_KEY} cannot be read by this version: {error}"
            raise JobError(message) from error
        if record.layout_version != LAYOUT_VERSION:
            message = (
                f"{JOB_KEY} cannot be read by this version: its layout is "
                f"{record.layout_version}, ours is {LAYOUT_VERSION}"
            )
            raise JobError(message)
        return record

    def differences(self, other: Self) -> list[str]:
        """Names of what decides the outputs and differs, with both values."""
        mine, theirs = self._deciding(), other._deciding()
        return [
            f"{name}: {_short(theirs.get(name))} there, {_short(mine.get(name))} asked"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def _deciding(self) -> dict[str, Any]:
        fields = asdict(self)
        for name in ("spec", "software_version", "trained"):
            del fields[name]
        return {**fields.pop("identity"), **fields}


def read_job(store: Store) -> JobRecord:
    """The job that lives at a store.

    Raises:
        UserError: If there is none.
    """
    held = _held(store)
    if held is None:
        message = f"{store.url}: no job here (no {JOB_KEY}); `segformer3d list` finds jobs"
        raise UserError(message)
    return JobRecord.from_json(held)


def is_job(store: Store, key: str) -> bool:
    """Whether an object, which anybody may have written, is the ``job.json`` of a job.

    Raises:
        StoreUnavailableError: If nobody can say.
    """
    try:
        JobRecord.from_json(store.read_small(key, _MAX_BYTES))
    except StoreUnavailableError:
        raise
    except (JobError, StorageError):
        return False
    return True


def claim_output(store: Store, record: JobRecord, *, single_driver: bool) -> JobRecord:
    """Make the output this job's, or find that it is already.

    Args:
        store: The job's store.
        record: The job as asked for now.
        single_driver: The user vouches that no second driver will work here.

    Returns:
        The record that the store holds.

    Raises:
        ConflictError: If the output holds another job, or this one with other settings.
        UserError: If it holds something else, or its store ignores conditional writes.
    """
    held = _held(store)
    if held is None:
        _refuse_strangers(store)
        if not single_driver and not probe_conditional_writes(store, PROBE_PREFIX):
            message = (
                f"{store.url}: this store ignores conditional writes, so two drivers could spoil "
                "a job; use another store, or vouch with --set output.single_driver=true"
            )
            raise UserError(message)
        held = create_once(store, JOB_KEY, record.to_json())
    theirs = JobRecord.from_json(held)
    differences = record.differences(theirs)
    if differences:
        message = (
            f"{store.url} holds another job ({'; '.join(differences)}); "
            "name another --output, or resume that job as it is with `segformer3d resume`"
        )
        raise ConflictError(message)
    return theirs


def _held(store: Store) -> bytes | None:
    try:
        return store.read_small(JOB_KEY, _MAX_BYTES)
    except ObjectNotFoundError:
        return None


def _refuse_strangers(store: Store) -> None:
    for item in store.list(""):
        if not item.key.startswith(OWN_PREFIXES) and item.key != JOB_KEY:
            message = (
                f"{store.url} is not empty and holds no job (it has {item.key!r}); "
                "name an empty or new --output"
            )
            raise UserError(message)


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}..."
