"""Which inputs have killed a process, counted so that no restart forgets it.

A decoding child's parent outlives it and makes each death an object of the job, beside which it
finds those that happened under earlier parents. The process that holds the model has nobody.

It notes on its machine's own disk which shards it is about to do, a file for each that is under
way, under locks that end with it. Whoever starts there next finds notes without a lock: their
writers died at what these say. Each such death becomes an object of the job,
``attempts/shard-.../...``. A machine or a driver that goes as a whole takes its notes along, or
leaves them under another lease, and accuses nobody.

A shard with a death is done frame by frame from then on, each frame noted before, and with no other
shard under way, which could be what kills the process. A frame at which two more processes die is
quarantined: three attempts. So is a shard at which three died between its frames, or twenty frames
were guilty. Deaths in the shard as a whole accuse no frame, however many: shards under way
together, or drivers side by side, have one each. So the first of a frame's three may have been a
neighbour's; the two at the frame are its own.
"""

import fcntl
import hashlib
import json
import math
import os
import socket
import stat
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition

import numpy as np

from pipeline.errors import ErrorKind
from pipeline.layout import DeathPlace, Generation, death_of, decode_death_of
from pipeline.records import canonical_json
from pipeline.storage import Store
from pipeline.tables import DecodedShard

MAX_FRAME_DEATHS = 2
MAX_SHARD_DEATHS = 3
# So many deaths at single frames are no accident of some; the rest of the shard is not tried then.
MAX_DEATHS_AT_FRAMES = 40

_KIND: ErrorKind = "crash"
_NOTE_BYTES = 64
_AT_REST = b" " * _NOTE_BYTES
# So long other shards may take to end. Who takes longer has lost the thread that would end it.
_ALONE_S = 60.0
# How long a look at the deaths of others is trusted; one's own are known from the start.
_TRUSTED_S = 5.0
# So old are notes of other drivers that are swept up: nobody comes back for them.
_OTHERS_S = 3600.0


@dataclass(frozen=True)
class Deaths:
    """How often a shard has killed its process.

    Attributes:
        at_frame: By the frame's place in the shard, while its frames went one by one.
        between: Between two of them.
        in_whole: While they went together.
    """

    at_frame: tuple[tuple[int, int], ...] = ()
    between: int = 0
    in_whole: int = 0

    def __bool__(self) -> bool:
        return bool(self.at_frame or self.between or self.in_whole)

    def guilty(self, num_frames: int) -> frozenset[int]:
        """Places of the frames that are not tried again."""
        # Drivers side by side may add deaths at one frame, which make no other frame guilty.
        at_frames = sum(min(count, MAX_FRAME_DEATHS) for _, count in self.at_frame)
        if self.between >= MAX_SHARD_DEATHS or at_frames >= MAX_DEATHS_AT_FRAMES:
            return frozenset(range(num_frames))
        return frozenset(place for place, count in self.at_frame if count >= MAX_FRAME_DEATHS)


class Journal:
    """One process's notes of what it is doing; any of its threads may write.

    Args:
        store: The job's store.
        generation: The generation that is being made.
        lease: The driver's lease.
        at_a_time: Shards that will be under way at a time.

    Raises:
        StorageError: If the deaths of earlier processes cannot be noted or listed.
    """

    def __init__(
        self, store: Store, generation: Generation, lease: int, *, at_a_time: int = 1
    ) -> None:
        self._store, self._generation = store, generation
        job = hashlib.sha256(f"{store.url} {generation.number}".encode()).hexdigest()[:20]
        folder = private_folder()
        self._report(job, lease)
        self._deaths = self._list()
        self._listed_s = time.monotonic()
        # All at the start: they keep their places on a disk that fills up.
        self._free = [
            _locked_file(folder / f"{job}-{lease}-{uuid.uuid4().hex}") for _ in range(at_a_time)
        ]
        self._taken: dict[int, int] = {}
        self._changed = Condition()

    def note(self, shard_id: int, place: DeathPlace = "shard") -> None:
        """Say what comes next: a shard as a whole, or something of one whose frames go alone.

        Waits while as many shards are under way as there may be.
        """
        data = json.dumps([shard_id, place]).encode()
        with self._changed:
            if shard_id not in self._taken:
                self._changed.wait_for(lambda: self._free)
                self._taken[shard_id] = self._free.pop()
            os.pwrite(self._taken[shard_id], data.ljust(_NOTE_BYTES), 0)

    def rest(self, shard_id: int) -> None:
        """Say that nothing is being done of a shard any more."""
        with self._changed:
            file = self._taken.pop(shard_id, None)
            if file is None:
                return
            try:
                os.pwrite(file, _AT_REST, 0)
            finally:
                self._free.append(file)
                self._changed.notify_all()

    def wait_until_alone(self) -> None:
        """Wait for the shards that other threads have under way, but not for ever."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken, _ALONE_S)

    def deaths(self, shard_id: int) -> Deaths:
        """Every death at a shard, whoever died.

        Raises:
            StorageError: If they cannot be listed.
        """
        # Where there are deaths, each one more decides something.
        if shard_id in self._deaths or time.monotonic() - self._listed_s > _TRUSTED_S:
            self._deaths, self._listed_s = self._list(), time.monotonic()
        return self._deaths.get(shard_id, Deaths())

    def _list(self) -> dict[int, Deaths]:
        places: dict[int, Counter[DeathPlace]] = {}
        for item in self._store.list(self._generation.attempts_prefix):
            death = death_of(item.key)
            if death is not None:
                places.setdefault(death[0], Counter())[death[1]] += 1
        return {
            shard_id: Deaths(
                at_frame=tuple((place, n) for place, n in counts.items() if isinstance(place, int)),
                between=counts["between"],
                in_whole=counts["shard"],
            )
            for shard_id, counts in places.items()
        }

    def _report(self, job: str, lease: int) -> None:
        """Turn the notes of processes that died here under this lease into objects of the job."""
        folders = _own_folders(Path(tempfile.gettempdir()))
        for path in sorted(path for folder in folders for path in folder.glob(f"{job}-*")):
            with _orphan(path) as said:
                if said is None:
                    continue
                note, name = _parse(said), path.name
                is_ours = name.startswith(f"{job}-{lease}-")
                if not is_ours and _age_s(path) < _OTHERS_S:
                    # Its driver may live, and its next process on this machine is to find it.
                    continue
                if note is not None and is_ours:
                    shard_id, place = note
                    # The note's own name: two who find it write one object.
                    attempt = name.rpartition("-")[2]
                    about = {"host": socket.gethostname(), "lease": lease, "place": place}
                    key = self._generation.death_key(shard_id, place, attempt)
                    self._store.put(key, canonical_json(about))
                path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class DecodeTally:
    """Counts the deaths of decoding children at one shard's inputs, whoever was their parent.

    Nothing is asked of the store before the first death.

    Attributes:
        store: The job's store.
        generation: The generation that is being made.
        lease: The driver's lease.
        shard_id: The shard.
    """

    store: Store
    generation: Generation
    lease: int
    shard_id: int

    def __call__(self, place: int, kind: ErrorKind) -> Counter[ErrorKind]:
        """Note a death at the input whose first frame has that place; all at it, by kind.

        Raises:
            StorageError: If it cannot be noted, or the earlier ones not be listed.
        """
        key = self.generation.decode_death_key(self.shard_id, place, kind, uuid.uuid4().hex)
        self.store.put(key, canonical_json({"host": socket.gethostname(), "lease": self.lease}))
        items = self.store.list(self.generation.shard_attempts_prefix(self.shard_id))
        deaths = (decode_death_of(item.key) for item in items)
        return Counter(death[1] for death in deaths if death is not None and death[0] == place)


def spare(shard: DecodedShard, deaths: Deaths) -> DecodedShard:
    """The shard with the frames that have killed too many processes typed as ``crash``."""
    guilty = deaths.guilty(len(shard.frames))
    if not guilty:
        return shard
    message = "the model's process died of it at every attempt"
    frames, kept = list(shard.frames), []
    for row, place in enumerate(shard.good_places):
        if place in guilty:
            frames[place] = replace(frames[place], error_kind=_KIND, error=message)
        else:
            kept.append(row)
    return replace(shard, frames=tuple(frames), pixels=shard.pixels[np.array(kept, np.intp)])


def private_folder(parent: Path | None = None) -> Path:
    """A temporary folder of this user alone; another one if somebody else was there first.

    Args:
        parent: Where; the usual place for temporary files unless told.
    """
    parent = parent or Path(tempfile.gettempdir())
    with suppress(FileExistsError):
        Path(parent, _folder_name()).mkdir(mode=0o700)
    found = next(_own_folders(parent), None)
    return found or Path(tempfile.mkdtemp(prefix=f"{_folder_name()}-", dir=parent))


def _own_folders(parent: Path) -> Iterator[Path]:
    """All such folders there, in one order for every process."""
    for folder in sorted([parent / _folder_name(), *parent.glob(f"{_folder_name()}-*")]):
        with suppress(OSError):
            status = folder.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if is_ours and not status.st_mode & 0o077:
                yield folder


def _folder_name() -> str:
    return f"segformer3d-{os.getuid()}"


def _locked_file(path: Path) -> int:
    """A new file, locked before anybody can find it by its name."""
    hidden = path.with_name(f".{path.name}")
    file = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.pwrite(file, _AT_REST, 0)
    hidden.rename(path)
    return file


@contextmanager
def _orphan(path: Path) -> Iterator[bytes | None]:
    """What a dead process noted, under its lock; None if the process lives or the note is gone."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield None
    else:
        yield os.pread(file, _NOTE_BYTES, 0)
    finally:
        os.close(file)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        # Somebody else has just swept it up.
        return math.inf


def _parse(said: bytes) -> tuple[int, DeathPlace] | None:
    """Shard and place; None if the process was at rest, or died while it wrote."""
    try:
        shard_id, place = json.loads(said)
    except ValueError:
        return None
    return int(shard_id), place if place in {"shard", "between"} else int(place)
