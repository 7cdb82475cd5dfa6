"""From a planned shard to its frames, in a child process that may crash or hang.

The child is started once per thread and used again. What an input does to it is told to the
input's own frames: a crash is tried three times, a hang twice, three times in all, each in a fresh
child, and every other input of the shard is unaffected. Whoever decodes for a job says how these
deaths are counted, so that no restart forgets them; everybody else counts those of one call.
"""

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from pipeline.decode_ledgers import Death, ProbeLedger, ShardLedger
from pipeline.decode_messages import Request
from pipeline.decode_process import DecodeProcess, abandon_all
from pipeline.errors import ErrorKind, JobError, UserError
from pipeline.pixel_memory import PixelPool
from pipeline.records import Asset, ShardSpec
from pipeline.sources.assets import AssetProbe, DecodeLimits
from pipeline.storage import StorageOptions
from pipeline.tables import DecodedShard

__all__ = [
    "DecodeLimits",
    "DecodeWorker",
    "Tally",
    "decode_shard",
    "probe_asset",
    "probe_assets",
    "start_child",
]

# Told of a death at an input, by the place of its first frame in the shard, and the death's kind:
# how many of each kind there were at it so far.
Tally = Callable[[int, ErrorKind], Mapping[ErrorKind, int]]

_MAX_ATTEMPTS = 3
_MAX_ATTEMPTS_OF_A_KIND: dict[ErrorKind, int] = {"crash": 3, "timeout": 2}
_MAX_IDLE_DEATHS = 3


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


def start_child(limits: DecodeLimits | None = None) -> None:
    """Start this thread's child, if it has none, so that the first shard need not wait for it.

    Raises:
        JobError: It cannot be started.
    """
    _thread_worker(limits or DecodeLimits()).start_child()


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
        self._child: DecodeProcess | None = None
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

    def start_child(self) -> DecodeProcess:
        """Start the child, unless it runs, and return it.

        Raises:
            JobError: It cannot be started.
        """
        if self._child is None or not self._child.is_alive():
            self._end_child()
            self._child = DecodeProcess(self.limits)
        return self._child

    def decode_shard(
        self, spec: ShardSpec, storage: StorageOptions | None = None, tally: Tally | None = None
    ) -> DecodedShard:
        """As the function of that name."""
        num_bytes = spec.num_frames * spec.input_width_px * spec.input_height_px * 3
        memory = self._pool.take(num_bytes)
        pixels = self._pool.lend(memory)[:num_bytes]
        ledger = ShardLedger(spec, storage or StorageOptions(), self.limits)
        self._settle(ledger, memory.fd, tally or _tally_of_one_call())
        return ledger.shard(pixels)

    def probe_assets(
        self, root: str, assets: Sequence[Asset], storage: StorageOptions | None = None
    ) -> list[AssetProbe]:
        """As the function of that name."""
        ledger = ProbeLedger(root, assets, storage or StorageOptions(), self.limits)
        self._settle(ledger, None, _tally_of_one_call())
        return ledger.probes()

    def _settle(self, ledger: ShardLedger | ProbeLedger, fd: int | None, tally: Tally) -> None:
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
        self, request: Request, fd: int | None, ledger: ShardLedger | ProbeLedger
    ) -> Death | None:
        """Send a request and take events until it is done, or the child is."""
        child = self.start_child()
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
            return Death(kind="timeout", message=message, item=item)
        except (EOFError, OSError, ValueError, LookupError, TypeError):
            # Gone, or its memory is so damaged that it talks nonsense.
            message, kind = child.autopsy()
            self._end_child()
            return Death(kind=kind, message=message, item=item)
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
    abandon_all()


os.register_at_fork(after_in_child=_after_fork)
