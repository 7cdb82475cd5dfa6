"""Drivers of one job: who is there, and how to ask them to stop.

A lease is only a number, made create-only. It saves double work and names whom to cancel; safety
rests on the commit records alone, so no clock is trusted and any number of drivers may work.
"""

import datetime
import functools
import json
import math
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pipeline.errors import ObjectForbiddenError, StorageError, StoreUnavailableError
from pipeline.layout import LEASE_PREFIX, cancel_key, heartbeat_key, lease_key
from pipeline.records import canonical_json
from pipeline.storage import Store, create_once

HEARTBEAT_S = 5.0
# A driver that has been silent for longer is taken for dead; only said, never relied upon.
SILENT_S = 30.0

# A submission that has not started a driver by then has failed on the cluster.
_SUBMITTED_S = 900.0
# A heartbeat has a few hundred bytes; a larger one says nothing.
_MAX_BYTES = 64 << 10
# Linux has no more.
_PIDS = 1 << 31
_NUMBER = re.compile(r"(lease|heartbeat)-(\d{8,})\.json")

DriverState = Literal["submitted", "planning", "running", "draining", "ended"]


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A driver's last sign of life.

    Attributes:
        lease: Number of its lease.
        host: Its machine.
        pid: Its process there.
        at: When it was written, ISO 8601 in UTC.
        state: What it was doing.
        num_done: Shards decided, as far as it knew.
        num_shards: Shards of the plan; 0 before there is one.
        frames_per_s: Its rate lately.
        pids: Which processes its ``pid`` is one of: machines and containers may share a name. Empty
            if unknown, as in heartbeats of before 2026-11-27.
    """

    lease: int
    host: str
    pid: int
    at: str
    state: DriverState
    num_done: int = 0
    num_shards: int = 0
    frames_per_s: float = 0.0
    pids: str = ""

    @classmethod
    def now(cls, lease: int, state: DriverState, **progress: Any) -> Self:
        """This process's heartbeat."""
        return cls(
            lease=lease,
            host=socket.gethostname(),
            pid=os.getpid(),
            at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            state=state,
            pids=_pids(),
            **progress,
        )

    @property
    def age_s(self) -> float:
        """Seconds since it was written, by this machine's clock."""
        written = datetime.datetime.fromisoformat(self.at)
        return (datetime.datetime.now(datetime.UTC) - written).total_seconds()

    @property
    def is_alive(self) -> bool:
        """Whether its driver is probably still there."""
        if self.state == "ended":
            return False
        if self.state == "submitted":
            return self.age_s < _SUBMITTED_S
        if self._is_of_this_machine and not _process_exists(self.pid):
            return False
        return self.age_s < SILENT_S

    @property
    def _is_of_this_machine(self) -> bool:
        return self.host == socket.gethostname() and self.pids in {"", _pids()}


def take_lease(store: Store, state: DriverState = "planning") -> int:
    """The next free number, now this driver's."""
    mine = canonical_json({"driver": uuid.uuid4().hex, "host": socket.gethostname()})
    number = 1 + max(_numbers(store, "lease"), default=0)
    while _create(store, number, mine) != mine:
        number += 1
    beat(store, Heartbeat.now(number, state))
    return number


def _create(store: Store, number: int, mine: bytes) -> bytes:
    try:
        return create_once(store, lease_key(number), mine)
    except StoreUnavailableError as error:
        if isinstance(error.__cause__, ObjectForbiddenError):
            # Nothing was begun that could have an unknown outcome: the user may not write here.
            raise error.__cause__ from None
        raise


def beat(store: Store, heartbeat: Heartbeat) -> None:
    """Write a sign of life; each driver has a key of its own."""
    store.put(heartbeat_key(heartbeat.lease), canonical_json(asdict(heartbeat)))


def heartbeats(store: Store) -> list[Heartbeat]:
    """Last sign of life of every driver that the job ever had, oldest lease first."""
    numbers = sorted(_numbers(store, "heartbeat", max_bytes=_MAX_BYTES))
    keys = [heartbeat_key(number) for number in numbers]
    found = []
    for _, data in store.read_many(keys):
        heartbeat = None if isinstance(data, StorageError) else _parse(data)
        if heartbeat is not None:
            found.append(heartbeat)
    return found


def _parse(data: bytes) -> Heartbeat | None:
    """A heartbeat is only news: one that cannot be read is none."""
    try:
        heartbeat = Heartbeat(**json.loads(data))
        return heartbeat if _makes_sense(heartbeat) else None
    except (TypeError, ValueError, ArithmeticError, RecursionError):
        return None


def _makes_sense(heartbeat: Heartbeat) -> bool:
    """Whether everybody who reads it can count and show what it says."""
    numbers = heartbeat.lease, heartbeat.num_done, heartbeat.num_shards
    return (
        all(type(number) is int for number in (*numbers, heartbeat.pid))
        and 0 < heartbeat.pid < _PIDS
        and type(heartbeat.host) is type(heartbeat.pids) is str
        and heartbeat.state in get_args(DriverState)
        and isinstance(heartbeat.frames_per_s, int | float)
        and 0 <= heartbeat.frames_per_s < math.inf
        and math.isfinite(heartbeat.age_s)
    )


def request_cancel(store: Store) -> list[Heartbeat]:
    """Ask every live driver to finish the shards in its actors and stop; returns those asked."""
    asked = [heartbeat for heartbeat in heartbeats(store) if heartbeat.is_alive]
    for heartbeat in asked:
        mark_cancelled(store, heartbeat.lease)
    return asked


def mark_cancelled(store: Store, lease: int) -> None:
    """Ask the driver of one lease to drain; its stages look for this marker."""
    store.put(cancel_key(lease), b"")


def is_cancelled(store: Store, lease: int) -> bool:
    """Whether that driver was asked to drain."""
    return store.head(cancel_key(lease)) is not None


class Pulse:
    """Writes a heartbeat every few seconds in a thread of its own, until closed.

    Args:
        store: The job's store.
        lease: This driver's lease.
        progress: Gives the fields of ``Heartbeat`` that change.
    """

    def __init__(self, store: Store, lease: int, progress: Callable[[], dict[str, Any]]) -> None:
        self._store, self._lease, self._progress = store, lease, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._beat("ended")

    def _run(self) -> None:
        self._beat(None)
        while not self._stop.wait(HEARTBEAT_S):
            self._beat(None)

    def _beat(self, state: DriverState | None) -> None:
        fields = self._progress()
        if state is not None:
            fields["state"] = state
        try:
            beat(self._store, Heartbeat.now(self._lease, **fields))
        except StorageError:
            # A missed sign of life costs nothing but news.
            return


def _numbers(store: Store, name: str, *, max_bytes: int | None = None) -> list[int]:
    found = []
    for item in store.list(LEASE_PREFIX):
        match = _NUMBER.fullmatch(item.key.removeprefix(LEASE_PREFIX))
        is_small = max_bytes is None or item.size_bytes <= max_bytes
        if match is not None and match[1] == name and is_small:
            found.append(int(match[2]))
    return found


def _pids() -> str:
    """What tells the process ids of this machine or container from those of others, if anything."""
    try:
        return _pids_of_this_process()
    except OSError:
        return ""


@functools.cache
def _pids_of_this_process() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
