"""The commit protocol's one decision: a create-only write whose outcome is read, never guessed."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from uuid import uuid4

from pipeline.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
)
from pipeline.storage.base import NoHardLinksError, Store

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_PROBE_WRITERS = 16
_PROBE_ROUNDS = 3


def create_once(store: Store, key: str, data: bytes, *, attempts: int = 6) -> bytes:
    """Create ``key`` unless somebody has, and return the bytes that stand there for good.

    Bytes equal to ``data`` mean that this writer won, so ``data`` must differ between writers
    that must be told apart. Whatever exception the write ends with, only the object that is then
    read back decides: a retried conditional write can fail on its own success.

    Raises:
        StoreUnavailableError: The outcome is unknown; the write may yet have succeeded, so the
            caller must not collect what ``data`` refers to.
        NoHardLinksError: Nothing was written, nor can be.
    """
    for attempt in range(attempts):
        try:
            store.create(key, data)
        except NoHardLinksError:
            raise
        except Exception as error:  # noqa: BLE001 - no exception tells what became of the write
            failure = error
        else:
            return data
        winner = _read_back(store, key, attempts)
        if winner is not None:
            return winner
        _pause(attempt)
    message = f"{store.url}: gave up creating {key!r} after {attempts} attempts: {failure}"
    raise StoreUnavailableError(message) from failure


def probe_conditional_writes(store: Store, prefix: str) -> bool:
    """Whether exactly one of 16 racing creates of a fresh key below ``prefix`` succeeds.

    Raises:
        StoreUnavailableError: The store fails too often to tell.
        StorageError: The store cannot be written at all.
    """
    num_refused = 0
    failure: StorageError | None = None
    for _ in range(_PROBE_ROUNDS):
        key = f"{prefix.rstrip('/')}/probe-{uuid4().hex}".lstrip("/")
        try:
            outcomes = _race(store, key)
            winners = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
            if len(winners) > 1:
                return False
            if winners:
                late = _late_create(store, key)
                if late is None or isinstance(late, ObjectExistsError):
                    return late is not None and store.read(key) == winners[0]
                failure = late
            elif store.exists(key):
                failure = next(item for item in outcomes if isinstance(item, StorageError))
            else:
                # Nobody won: either the condition is refused, or every write is, which raises.
                store.put(key, b"probe")
                num_refused += 1
        finally:
            store.delete([key])
    if num_refused == _PROBE_ROUNDS:
        return False
    message = f"{store.url}: cannot tell whether this store obeys conditional writes: {failure}"
    raise StoreUnavailableError(message)


def _race(store: Store, key: str) -> list[bytes | StorageError]:
    barrier = Barrier(_PROBE_WRITERS)

    def write(index: int) -> bytes | StorageError:
        data = f"{key} {index}".encode()
        barrier.wait()
        try:
            store.create(key, data)
        except NoHardLinksError:
            raise
        except StorageError as error:
            return error
        return data

    with ThreadPoolExecutor(_PROBE_WRITERS) as pool:
        return list(pool.map(write, range(_PROBE_WRITERS)))


def _late_create(store: Store, key: str) -> StorageError | None:
    try:
        store.create(key, b"late")
    except StorageError as error:
        return error
    return None


def _read_back(store: Store, key: str, attempts: int) -> bytes | None:
    for attempt in range(attempts):
        try:
            return store.read(key)
        except ObjectNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - unreadable is an outcome of its own
            failure = error
        _pause(attempt)
    message = f"{store.url}: cannot read back {key!r}, its outcome is unknown: {failure}"
    raise StoreUnavailableError(message) from failure


def _pause(attempt: int) -> None:
    longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
    time.sleep(longest_s * random.uniform(0.5, 1))  # noqa: S311 - jitter  # nosec B311
