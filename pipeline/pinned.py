"""Objects that another object pins by their digest."""

import hashlib

from pipeline.errors import JobError
from pipeline.storage import Store


class DamagedError(JobError):
    """An object is not what it was when it was pinned; the message names it."""


def read_pinned(store: Store, key: str, sha256: str | None) -> bytes:
    """An object that is what it was.

    Args:
        store: The job's store.
        key: Of the object.
        sha256: Hex digest that it must have; None for the part of a plan that has none.

    Raises:
        DamagedError: It has another.
        StorageError: It cannot be read.
    """
    data = store.read(key)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(f"{key}: other content than was committed")
    return data
