"""From a planned shard to its frames, in a child process that may crash or hang.

The child is started once per thread and used again. What an input does to it is told to the
input's own frames: a crash is tried three times, a hang twice, three times in all, each in a fresh
child, and every other input of the shard is unaffected. Whoever decodes for a job says how these
deaths are counted, so that no restart forgets them; everybody else counts those of one call.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Self

from pipeline.decode_messages import (
    DecodeItem,
    DecodeRequest,
    Event,
    ProbeRequest,
    Request,
    receive_event,
    send_request,
)
from pipeline.errors import ERROR_KINDS, ErrorKind, JobError, UserError, one_line
from pipeline.pixel_memory import PixelPool
from pipeline.records import Asset, DecodedShard, FrameRecord, ShardSpec, Slice, UInt8Array
from pipeline.sources.assets import AssetProbe, DecodeLimits
from pipeline.sources.capture import Capture
from pipeline.storage import StorageOptions

__all__ = ["DecodeLimits", "DecodeWorker", "Tally", "decode_shard", "probe_asset", "probe_assets"]

# Told of a death at an input, by the place of its first frame in the shard, and the death's kind:
# how many of each kind there were at it so far.
Tally = Callable[[int, ErrorKind], Mapping[ErrorKind, int]]

_START_DEADLINE_S = 120.0
_EXIT_S = 5.0
_MAX_ATTEMPTS = 3
_MAX_ATTEMPTS_OF_A_KIND: dict[ErrorKind, int] = {"crash": 3, "timeout": 2}
_MAX_IDLE_DEATHS = 3
_MAX_MESSAGE_CHARS = 500
_INT64 = 1 << 63
# Of glibc; larger buffers go back to the kernel at once, and so does what is free beyond.
_KEEP_BUFFERS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
# Microseconds at the end of the year 9999, beyond which readers of Parquet know no date.
_LAST_INSTANT_US = 253_402_300_799_999_999


def decode_shard(
    spec: ShardSpec,
    storage: StorageOptions | None = None,
    limits: DecodeLimits | None = None,
    tally: Tally | None = None,
) -> DecodedShard:
    """Decode a shard with this thread's own worker.

    Every planned frame comes back with pixels or with a typed error.

    Args:
        spec: The shard.
        storage: How to reach the archive.
        limits: Bounds of the decoder.
        tally: Counts the deaths at each input; None counts those of this call.

    Raises:
        UserError: The archive's URL cannot be opened.
        JobError: The child cannot be started.
    """
    return _thread_worker(limits or DecodeLimits()).decode_shard(spec, storage, tally)


def probe_assets(
    root: str,
    assets: Sequence[Asset],
    storage: StorageOptions | None = None,
    limits: DecodeLimits | None = None,
) -> list[AssetProbe]:
    """Probe assets with this thread's own worker; what cannot be opened says so in its probe.

    Args:
        root: URL of the archive.
        assets: What to probe.
        storage: How to reach the archive.
        limits: Bounds of the decoder.

    Raises:
        UserError: The archive's URL cannot be opened.
        JobError: The child cannot be started.
    """
    return _thread_worker(limits or DecodeLimits()).probe_assets(root, assets, storage)


def probe_asset(
    root: str,
    asset: Asset,
    storage: StorageOptions | None = None,
    limits: DecodeLimits | None = None,
) -> AssetProbe:
    """Probe one asset; see ``probe_assets``."""
    return probe_assets(root, [asset], storage, limits)[0]


class DecodeWorker:
    """One decoding child, started when needed, started afresh when it dies.

    Used by one thread at a time. ``close`` ends the child; so do the garbage collector and the end
    of the process.

    Args:
        limits: Bounds that the child keeps.
    """

    def __init__(self, limits: DecodeLimits | None = None) -> None:
        self.limits = limits or DecodeLimits()
        self._child: _Child | None = None
        self._pool = PixelPool()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child, if there is one."""
        return self._child.process.pid if self._child else None

    def close(self) -> None:
        """End the child, and let its memory go; the next call starts another."""
        self._end_child()
        self._pool = PixelPool()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def decode_shard(
        self, spec: ShardSpec, storage: StorageOptions | None = None, tally: Tally | None = None
    ) -> DecodedShard:
        """As the function of that name."""
        num_bytes = spec.num_frames * spec.input_width_px * spec.input_height_px * 3
        memory = self._pool.take(num_bytes)
        pixels = self._pool.lend(memory)[:num_bytes]
        ledger = _ShardLedger(spec, storage or StorageOptions(), self.limits)
        self._settle(ledger, memory.fd, tally or _tally_of_one_call())
        return ledger.shard(pixels)

    def probe_assets(
        self, root: str, assets: Sequence[Asset], storage: StorageOptions | None = None
    ) -> list[AssetProbe]:
        """As the function of that name."""
        ledger = _ProbeLedger(root, assets, storage or StorageOptions(), self.limits)
        self._settle(ledger, None, _tally_of_one_call())
        return ledger.probes()

    def _settle(self, ledger: "_ShardLedger | _ProbeLedger", fd: int | None, tally: Tally) -> None:
        """Talk to children until every entry of the ledger has its outcome."""
        num_idle_deaths = 0
        while todo := ledger.todo():
            death = self._converse(ledger.request(todo), fd, ledger)
            if death is None:
                if ledger.todo():
                    raise JobError("the decoding child left inputs without an outcome")
            elif death.item is None:
                num_idle_deaths += 1
                if num_idle_deaths == _MAX_IDLE_DEATHS:
                    raise JobError(f"the decoding child cannot work: {death.message}")
            else:
                place = ledger.place(todo[death.item])
                if _are_enough(tally(place, death.kind)):
                    ledger.fail(place, death)

    def _converse(
        self, request: Request, fd: int | None, ledger: "_ShardLedger | _ProbeLedger"
    ) -> "_Death | None":
        """Send a request and take events until it is done, or the child is."""
        if self._child is None or not self._child.is_alive():
            self._end_child()
            self._child = _Child(self.limits)
            _children.add(self._child)
        child = self._child
        item: int | None = None
        try:
            child.send(request, fd)
            while (event := child.receive(self.limits.deadline_s))[0] != "done":
                if event[0] == "begin":
                    item = int(event[1])
                elif event[0] == "refused":
                    raise UserError(str(event[1]))
                elif event[0] != "alive":
                    ledger.take(event)
        except TimeoutError:
            self._end_child()
            message = f"no progress for {self.limits.deadline_s:g} s"
            return _Death(kind="timeout", message=message, item=item)
        except (EOFError, OSError, ValueError, LookupError, TypeError):
            # Gone, or its memory is so damaged that it talks nonsense.
            message, kind = child.autopsy()
            self._end_child()
            return _Death(kind=kind, message=message, item=item)
        except BaseException:
            self._end_child()
            raise
        return None


def _tally_of_one_call() -> Tally:
    deaths: defaultdict[int, Counter[ErrorKind]] = defaultdict(Counter)

    def count(place: int, kind: ErrorKind) -> Mapping[ErrorKind, int]:
        deaths[place][kind] += 1
        return deaths[place]

    return count


def _are_enough(deaths: Mapping[ErrorKind, int]) -> bool:
    """Whether an input at which so many children died of each kind is given up."""
    return sum(deaths.values()) >= _MAX_ATTEMPTS or any(
        count >= _MAX_ATTEMPTS_OF_A_KIND[kind] for kind, count in deaths.items()
    )


@dataclass(frozen=True, kw_only=True)
class _Death:
    """How a child died, and at which item of its request, if it had begun one."""

    kind: ErrorKind
    message: str
    item: int | None


class _ShardLedger:
    """What is planned, and what became of it; an entry is a slice's place in the shard.

    An input is an asset, however many slices of it there are; its place is its first frame's.
    """

    def __init__(self, spec: ShardSpec, storage: StorageOptions, limits: DecodeLimits) -> None:
        self._spec = spec
        self._storage = storage
        self._limits = limits
        # Slot by slot: None without an outcome, an empty tuple for a good frame, or its error.
        self._outcomes: list[tuple[()] | tuple[ErrorKind, str] | None] = []
        self._starts: list[int] = []
        self._places: list[int] = []
        first: dict[str, int] = {}
        for part in spec.slices:
            self._starts.append(len(self._outcomes))
            self._places.append(first.setdefault(part.asset, self._starts[-1]))
            known = part.error_kind and (part.error_kind, part.error or part.error_kind)
            self._outcomes += [known or None] * len(part.frame_index)

    def todo(self) -> list[int]:
        """Slices with frames that have no outcome."""
        return [entry for entry in range(len(self._starts)) if self._left(entry)]

    def request(self, todo: Sequence[int]) -> DecodeRequest:
        """What to ask of a child."""
        return DecodeRequest(
            root=self._spec.root,
            storage=self._storage,
            limits=self._limits,
            size=(self._spec.input_width_px, self._spec.input_height_px),
            items=tuple(self._item(entry) for entry in todo),
        )

    def take(self, event: Event) -> None:
        """Note what the child says of one slot."""
        name, slot = event[0], int(event[1])
        if name == "frame":
            self._outcomes[slot] = ()
        elif name == "error":
            self._outcomes[slot] = _error_kind(event[2]), _one_line(event[3])

    def place(self, entry: int) -> int:
        """Which input a slice is of."""
        return self._places[entry]

    def fail(self, place: int, death: _Death) -> None:
        """Give up what is left of an input, in all its slices."""
        for entry in self.todo():
            if self._places[entry] == place:
                for slot in self._left(entry):
                    self._outcomes[slot] = death.kind, death.message

    def shard(self, memory: UInt8Array) -> DecodedShard:
        """All frames, and the pixels of the good ones moved together."""
        spec = self._spec
        good = [slot for slot, outcome in enumerate(self._outcomes) if outcome == ()]
        pixels = memory.reshape(-1, spec.input_height_px, spec.input_width_px, 3)
        for place, slot in enumerate(good):
            if place != slot:
                pixels[place] = pixels[slot]
        records = [record for part in spec.slices for record in _records(part)]
        frames = tuple(
            replace(record, error_kind=outcome[0], error=outcome[1]) if outcome else record
            for record, outcome in zip(records, self._outcomes, strict=True)
        )
        # A view of nothing would hold all of the memory.
        pixels = pixels[: len(good)] if good else pixels[:0].copy()
        return DecodedShard(shard_id=spec.shard_id, frames=frames, pixels=pixels)

    def _left(self, entry: int) -> list[int]:
        start = self._starts[entry]
        slots = range(start, start + len(self._spec.slices[entry].frame_index))
        return [slot for slot in slots if self._outcomes[slot] is None]

    def _item(self, entry: int) -> DecodeItem:
        part, slots = self._spec.slices[entry], self._left(entry)
        wanted = part.take([slot - self._starts[entry] for slot in slots])
        return DecodeItem(part=replace(wanted, pts_s=()), slots=tuple(slots))


class _ProbeLedger:
    """Assets to probe and what is known of them; an entry is an asset's place in the list."""

    def __init__(
        self, root: str, assets: Sequence[Asset], storage: StorageOptions, limits: DecodeLimits
    ) -> None:
        self._root = root
        self._assets = assets
        self._storage = storage
        self._limits = limits
        self._probes: dict[int, AssetProbe] = {}
        self._sent: Sequence[int] = ()

    def todo(self) -> list[int]:
        """Assets without a probe."""
        return [entry for entry in range(len(self._assets)) if entry not in self._probes]

    def request(self, todo: Sequence[int]) -> ProbeRequest:
        """What to ask of a child."""
        self._sent = todo
        return ProbeRequest(
            root=self._root,
            storage=self._storage,
            limits=self._limits,
            assets=tuple(self._assets[entry] for entry in todo),
        )

    def take(self, event: Event) -> None:
        """Note what the child says of one asset."""
        name, entry = event[0], self._sent[int(event[1])]
        if name == "error":
            self._set_error(entry, _error_kind(event[2]), _one_line(event[3]))
        elif name == "probe":
            fields = event[2] | {
                "pts": tuple(event[2]["pts"]),
                "keyframe_pts": tuple(event[2]["keyframe_pts"]),
                "time_base": Fraction(event[2]["time_base"]),
                "capture": Capture(**event[2]["capture"]),
                "members": tuple(Asset(**member) for member in event[2]["members"]),
            }
            probe = AssetProbe(asset=self._assets[entry], **fields)
            _check_sense(probe)
            self._probes[entry] = probe

    def place(self, entry: int) -> int:
        """Which input an asset is: itself."""
        return entry

    def fail(self, place: int, death: _Death) -> None:
        """Give up an asset."""
        self._set_error(place, death.kind, death.message)

    def probes(self) -> list[AssetProbe]:
        """One per asset, in order."""
        return [self._probes[entry] for entry in range(len(self._assets))]

    def _set_error(self, entry: int, kind: ErrorKind, message: str) -> None:
        asset = self._assets[entry]
        self._probes[entry] = AssetProbe(asset=asset, error_kind=kind, error=message)


class _Child:
    """One process of ``pipeline.decode_child`` and the socket to it."""

    def __init__(self, limits: DecodeLimits) -> None:
        self.channel, theirs = socket.socketpair()
        self._stderr = os.memfd_create("decode-stderr")
        arguments = [str(theirs.fileno()), str(limits.memory_bytes)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.decode_child", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                env=_environment(limits),
            )
        self._finalizer = weakref.finalize(
            self, _end, self.process, self.channel, self._stderr, os.getpid()
        )
        self._await_ready()

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def send(self, request: Request, fd: int | None) -> None:
        """Hand over a request."""
        send_request(self.channel, request, fd)

    def receive(self, timeout_s: float) -> Event:
        """The next event.

        Raises:
            TimeoutError: The child is silent.
            EOFError: It is gone.
            ValueError: It talks nonsense.
        """
        self.channel.settimeout(timeout_s)
        return receive_event(self.channel)

    def autopsy(self) -> tuple[str, ErrorKind]:
        """What it died of."""
        try:
            code = self.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return "the decoder stopped making sense", "crash"
        if code == -signal.SIGALRM:
            return "the decoder made no progress", "timeout"
        if code < 0:
            return f"the decoder was ended by {_signal_name(-code)}", "crash"
        return f"the decoder ended with exit code {code}", "crash"

    def end(self) -> None:
        """Kill it and release what it held."""
        self._finalizer()

    def abandon(self) -> None:
        """After a fork: it is the parent's child, and this is only a copy of the handle."""
        self._finalizer.detach()
        self.channel.close()
        os.close(self._stderr)
        self.process.returncode = 0

    def _await_ready(self) -> None:
        try:
            if self.receive(_START_DEADLINE_S) == ["ready"]:
                return
            reason = "it does not say that it is ready"
        except (EOFError, OSError, ValueError) as error:
            lines = os.pread(self._stderr, 1 << 16, 0).decode(errors="replace").splitlines()
            reason = lines[-1] if lines else f"{type(error).__name__} {error}"
        self.end()
        raise JobError(f"the decoding child does not start: {reason}")


def _end(
    process: subprocess.Popen[bytes], channel: socket.socket, stderr: int, owner_pid: int
) -> None:
    channel.close()
    os.close(stderr)
    if os.getpid() != owner_pid:
        return
    process.kill()
    process.wait()


def _environment(limits: DecodeLimits) -> dict[str, str]:
    """The parent's environment, its import path, and one thread for every library.

    The allocator keeps freed buffers of a picture's size, unless told otherwise: new ones are
    cleared by the kernel page by page, which costs as much as decoding into them.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return (
        _KEEP_BUFFERS
        | inherited
        | {
            "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
            "OPENCV_IO_MAX_IMAGE_PIXELS": str(limits.max_pixels),
            "OPENCV_LOG_LEVEL": "OFF",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
    )


def _records(part: Slice) -> Iterator[FrameRecord]:
    for place, frame_index in enumerate(part.frame_index):
        pts_s = part.pts_s[place] if part.pts_s else None
        captured_at_us = part.captured_at_us
        if captured_at_us is not None and pts_s is not None:
            captured_at_us += round(pts_s * 1e6)
            if not 0 <= captured_at_us <= _LAST_INSTANT_US:
                captured_at_us = None
        yield FrameRecord(
            asset=part.asset,
            frame_index=frame_index,
            pts_s=pts_s,
            width=part.width,
            height=part.height,
            captured_at_us=captured_at_us,
            latitude=part.latitude,
            longitude=part.longitude,
        )


def _error_kind(value: object) -> ErrorKind:
    for kind in ERROR_KINDS:
        if kind == value:
            return kind
    raise ValueError(f"not an error kind: {value!r}")


def _one_line(message: object) -> str:
    """What a child says of an error, fit for a column and a terminal whatever it holds."""
    text = one_line(str(message).encode(errors="replace").decode())
    return text[:_MAX_MESSAGE_CHARS] or "no reason was given"


def _check_sense(probe: AssetProbe) -> None:
    """See that a child that has read hostile bytes says what a plan can hold.

    Raises:
        ValueError: If it does not.
    """
    counts = probe.width, probe.height, probe.num_missing
    ticks = *probe.pts, *probe.keyframe_pts
    if set(map(type, (*counts, *ticks))) != {int} or probe.time_base <= 0:
        message = "not a probe"
        raise ValueError(message)
    if min(counts) < 0 or max(map(abs, (*counts, *ticks))) >= _INT64:
        message = "a probe with impossible numbers"
        raise ValueError(message)
    for member in probe.members:
        _check_member(member, probe.asset)


def _check_member(member: Asset, tar: Asset) -> None:
    numbers = member.offset, member.size_bytes
    is_own = (member.container, member.etag) == (tar.path, tar.etag)
    if (
        not is_own
        or member.kind not in {"image", "video"}
        or not member.path.startswith(f"{tar.path}/")
    ):
        message = "a member of another tar"
        raise ValueError(message)
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or sum(numbers) > tar.size_bytes:
        message = "a member that lies outside its tar"
        raise ValueError(message)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_children: "weakref.WeakSet[_Child]" = weakref.WeakSet()
_workers = threading.local()


def _thread_worker(limits: DecodeLimits) -> DecodeWorker:
    worker: DecodeWorker | None = getattr(_workers, "worker", None)
    if worker is None or worker.limits != limits:
        if worker is not None:
            worker.close()
        worker = _workers.worker = DecodeWorker(limits)
    return worker


def _after_fork() -> None:
    global _workers  # noqa: PLW0603 - the forked process has none of the parent's children
    _workers = threading.local()
    for child in list(_children):
        child.abandon()
    _children.clear()


os.register_at_fork(after_in_child=_after_fork)
