"""A world in one process: a store, clocks and blocking clients, all of them ruled by one seed.

Every client is real, blocking code on a thread of its own, but only one thread runs at a time: a
client that waits, for its request or for a pause, picks what happens next by the virtual clock and
hands over to it. So the order follows from the seed alone, and a handover costs microseconds.

What can go wrong is drawn per request: it is lost, its answer is lost, it takes effect at any time
later, twice, a create is refused although it took effect or although nothing is there, the process
dies before or after it, freezes for a long time (a zombie), or its clock jumps. Each seed has its
own selection of these and its own rate, so that some seeds see much of one kind.

Also modelled: listings that are read page by page while others write, in an order of their own,
and parallel reads that finish in any order. Not modelled: bytes that rot, a store that forgets.
"""

import heapq
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pipeline.errors import (
    ObjectExistsError,
    ObjectForbiddenError,
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
)
from pipeline.storage import ObjectInfo
from tests.virtual_store import Request, VirtualStore

MISHAPS = (
    "request lost",
    "answer lost",
    "arrives late",
    "arrives twice",
    "refused though done",
    "refused for nothing",
    "credentials expired",
    "crash before",
    "crash after",
    "frozen",
    "clock jumps",
)
_ONLY_WRITES = {"answer lost", "arrives late", "arrives twice"}
_ONLY_CREATES = ("refused though done", "refused for nothing")
_HITS_PROCESS = {"crash before", "frozen", "clock jumps"}
_SENT_LATE = {"arrives late", "arrives twice"}
_WITHOUT_EFFECT = {"request lost", "arrives late", "refused for nothing", "credentials expired"}
_TOLD: dict[str, type[StorageError]] = {
    "request lost": StoreUnavailableError,
    "answer lost": StoreUnavailableError,
    "arrives late": StoreUnavailableError,
    "refused though done": ObjectExistsError,
    "refused for nothing": ObjectExistsError,
    "credentials expired": ObjectForbiddenError,
}
_NOTHING = Request("read", "")
_HANDOVER_TIMEOUT_S = 120.0
_MOST_REQUESTS = 20_000


class _DeadError(BaseException):
    """Unwinds a client whose process is no more; the code under test catches every Exception."""


@dataclass(eq=False)
class Process:
    """What dies, freezes and tells the time as one.

    Attributes:
        name: For people.
        host: Its machine.
        pid: Its number there.
        disturbed: Whether faults may befall it.
        skew_s: Its clock less the world's.
        is_alive: False once it has crashed.
        frozen_until_s: None of its clients runs before.
        clients: All that ran in it.
    """

    name: str
    host: str
    pid: int
    disturbed: bool = True
    skew_s: float = 0.0
    is_alive: bool = True
    frozen_until_s: float = 0.0
    clients: list["Client"] = field(default_factory=list)


@dataclass(eq=False)
class Client:
    """A program on a thread of its own.

    Attributes:
        name: For people.
        process: Where it runs.
        program: What it runs.
        has_ended: Whether it has returned, raised or died.
        wake: Number of the event that it waits for.
        waiting: Clients that wait for its end.
        thread: What carries it, once it has begun.
    """

    name: str
    process: Process
    program: Callable[[], None]
    has_ended: bool = False
    wake: int = 0
    waiting: list["Client"] = field(default_factory=list)
    thread: "_Carrier | None" = None


class Packet(NamedTuple):
    """A write that is still on its way."""

    sender: str
    request: Request


class Watch(Protocol):
    """Sees everything that the world does."""

    def asked(self, client: Client, request: Request) -> None:
        """A request is about to be sent."""

    def changed(self, actor: str, key: str, before: bytes | None, after: bytes | None) -> None:
        """An object came, went or was replaced."""


class World:
    """The clock, the objects and everybody in it.

    Args:
        seed: Decides everything.

    Attributes:
        rng: The one source of chance.
        now_s: The time, in seconds since the beginning.
        objects: What the store holds.
        is_calm: No fault happens any more.
        current: Who is running.
        broken: The first rule that was broken, if any.
        counts: How often each thing happened.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.now_s = 0.0
        self.objects: dict[str, bytes] = {}
        self.is_calm = False
        self.current: Client | None = None
        self.broken: str | None = None
        self.counts: Counter[str] = Counter()
        self._log: list[tuple[float, str, Request, str]] = []
        self.watch: Watch | None = None
        self.processes: list[Process] = []
        self.store = SimulatedStore(self)
        self._events: list[tuple[float, int, Client | Packet]] = []
        self._num_events = 0
        self._num_requests = 0
        self._is_over = False
        self._main = threading.Lock()
        self._main.acquire()
        # A selection of its own for each seed: what is rare among all is common in some.
        self._mishaps = {name: rng.random() ** 2 for name in MISHAPS if rng.random() < 0.6}
        self._rate = rng.choice((0.0, 0.02, 0.05, 0.1, 0.2)) if self._mishaps else 0.0
        self._latency_s = rng.choice((0.02, 0.2, 2.0))
        self._page = rng.choice((None, None, None, 1, 3))
        self._lists_backwards = rng.random() < 0.5

    # Clients and time.

    def process(self, name: str, *, disturbed: bool = True) -> Process:
        """A new process on one of a few machines, with a clock of its own."""
        rng = self.rng
        process = Process(
            name=name,
            host=f"host-{int(rng.random() * 3)}",
            pid=1000 + len(self.processes),
            disturbed=disturbed,
            skew_s=rng.choice((0.0, 0.0, 3.0, -40.0, 4000.0, -1e6)),
        )
        self.processes.append(process)
        return process

    def spawn(
        self, process: Process, name: str, program: Callable[[], None], delay_s: float = 0.0
    ) -> Client:
        """Start a program in a process, after a while."""
        client = Client(name, process, program)
        process.clients.append(client)
        self._wake(client, self.now_s + delay_s)
        return client

    def run(self) -> None:
        """Let everything happen, until nobody has anything left to do and no packet is under way.

        Raises:
            RuntimeError: If a thread does not hand over: a client blocks on something real.
        """
        self._pass_on(None)
        if not self._main.acquire(timeout=_HANDOVER_TIMEOUT_S):
            message = f"{self.current and self.current.name} blocks outside the simulation"
            raise RuntimeError(message)
        asleep = [
            client.name
            for process in self.processes
            for client in process.clients
            if not client.has_ended
        ]
        if asleep:
            self.fail(f"nobody waits for ever ({', '.join(asleep)})")
            for process in self.processes:
                for client in process.clients:
                    if not client.has_ended:
                        self._wake(client, self.now_s)
            self.run()

    def sleep(self, seconds: float) -> None:
        """Let the running client wait."""
        me = self.me
        at_s = self.now_s + seconds
        events = self._events
        if (not events or at_s < events[0][0]) and me.process.frozen_until_s <= at_s:
            # Nothing happens before: the short way through the queue.
            self.now_s = at_s
            if self._is_over or not me.process.is_alive:
                raise _DeadError
            return
        self._wake(me, at_s)
        self._wait(me)

    def wait(self, timeout_s: float | None = None) -> None:
        """Let the running client wait until ``rouse``, or until the time is over."""
        me = self.me
        if timeout_s is not None:
            self._wake(me, self.now_s + timeout_s)
        self._wait(me)

    def rouse(self, client: Client) -> None:
        """Wake a client now, whatever it waits for."""
        if not client.has_ended:
            self._wake(client, self.now_s)

    def join(self, other: Client) -> None:
        """Let the running client wait for the end of another."""
        while not other.has_ended:
            other.waiting.append(self.me)
            self.wait()

    def crash(self, process: Process) -> None:
        """End a process at once: its clients hear nothing any more."""
        process.is_alive = False
        for client in process.clients:
            if client is not self.current:
                self.rouse(client)

    @property
    def me(self) -> Client:
        """The running client."""
        assert self.current is not None
        return self.current

    def fail(self, rule: str) -> None:
        """Note a broken rule, and end the world: what follows from it is of no interest."""
        if self.broken is None:
            self.broken = rule
            name = self.current.name if self.current else "the judge"
            self._log.append((self.now_s, name, _NOTHING, f"RULE BROKEN: {rule}"))
        self._is_over = True
        self._events = [event for event in self._events if isinstance(event[2], Client)]
        heapq.heapify(self._events)

    def schedule(self) -> str:
        """All that happened, a line each, for a person."""
        return "\n".join(
            f"{at_s:10.2f} s  {name:<18} {' '.join(filter(None, (*request[:2], fate)))}"
            for at_s, name, request, fate in self._log
        )

    def _wake(self, client: Client, at_s: float) -> None:
        self._num_events += 1
        client.wake = self._num_events
        heapq.heappush(self._events, (at_s, self._num_events, client))

    def _wait(self, me: Client) -> None:
        self._pass_on(me)
        if self._is_over or not me.process.is_alive:
            raise _DeadError

    def _pass_on(self, me: Client | None) -> None:
        """Let things happen until it is ``me``'s turn; None is a client that has ended."""
        events = self._events
        while events:
            at_s, number, event = heapq.heappop(events)
            if isinstance(event, Packet):
                self.now_s = max(at_s, self.now_s)
                self._log.append((self.now_s, event.sender, event.request, "(late packet)"))
                self._perform(event.sender, event.request)
                events = self._events
                continue
            if number != event.wake or event.has_ended:
                continue
            process = event.process
            if process.frozen_until_s > at_s and process.is_alive and not self._is_over:
                self._wake(event, process.frozen_until_s)
                continue
            self.now_s = max(at_s, self.now_s)
            self.current = event
            if event is me:
                return
            if event.thread is None:
                event.thread = _carrier()
                event.thread.work = (self, event)
            event.thread.turn.release()
            break
        else:
            self.current = None
            self._main.release()
        if me is not None:
            assert me.thread is not None
            me.thread.turn.acquire()

    def _run(self, client: Client) -> None:
        try:
            if client.process.is_alive and not self._is_over:
                client.program()
        except _DeadError:
            pass
        except BaseException as error:  # noqa: BLE001 - nothing may end a thread of the world
            self.fail(f"nothing but the store fails ({client.name}: {error!r})")
        client.has_ended = True
        for other in client.waiting:
            self.rouse(other)

    # Requests.

    def ask(self, request: Request) -> object:
        """Carry out a request of the running client, or let it go wrong."""
        me = self.me
        process = me.process
        if self._is_over or not process.is_alive:
            raise _DeadError
        if self.watch is not None:
            self.watch.asked(me, request)
        self._num_requests += 1
        if self._num_requests > _MOST_REQUESTS:
            self.fail("every run ends")
        chance = self.rng.random
        self.sleep(2 * self._latency_s * chance())
        if not self.is_calm and process.disturbed and chance() < self._rate:
            return self._go_wrong(me, request)
        self._log.append((self.now_s, me.name, request, ""))
        return _told(request, *self._perform(me.name, request))

    @property
    def num_requests(self) -> int:
        """Requests so far."""
        return self._num_requests

    def _go_wrong(self, me: Client, request: Request) -> object:
        what = self._mishap(request)
        self.counts[what] += 1
        self._log.append((self.now_s, me.name, request, f"({what})"))
        if what in _HITS_PROCESS:
            self._hit(me.process, what)
        if what in _SENT_LATE:
            self._send_late(me, request)
        value, error = None, None
        if what not in _WITHOUT_EFFECT:
            value, error = self._perform(me.name, request)
        if what == "crash after":
            self._die(me.process)
        return _told(request, value, _TOLD.get(what, error))

    def _mishap(self, request: Request) -> str:
        (what,) = self.rng.choices(list(self._mishaps), list(self._mishaps.values()))
        if request.verb == "create" and self.rng.random() < 0.3:
            what = self.rng.choice(_ONLY_CREATES)
        if (what in _ONLY_WRITES and request.verb not in {"put", "create", "delete"}) or (
            what in _ONLY_CREATES and request.verb != "create"
        ):
            return "request lost"
        return what

    def _hit(self, process: Process, what: str) -> None:
        rng = self.rng
        if what == "crash before":
            self._die(process)
        elif what == "frozen":
            # Before the request takes effect; other clients go on meanwhile.
            process.frozen_until_s = self.now_s + 10 ** rng.uniform(0.5, 3.5)
            self.sleep(0)
        else:
            process.skew_s += rng.choice((-1, 1)) * 10 ** rng.uniform(0, 6)

    def _die(self, process: Process) -> None:
        self.crash(process)
        raise _DeadError

    def _send_late(self, me: Client, request: Request) -> None:
        self._num_events += 1
        at_s = self.now_s + 10 ** self.rng.uniform(-1, 4)
        heapq.heappush(self._events, (at_s, self._num_events, Packet(me.name, request)))

    def _perform(self, actor: str, request: Request) -> tuple[object, type[StorageError] | None]:
        """Let a request take effect: its honest value, or the class of its error."""
        verb, key, data = request
        objects = self.objects
        if verb == "list":
            return self._list_page(key, data.decode()), None
        held = objects.get(key)
        if verb == "head":
            return None if held is None else _info(key, held), None
        if verb == "read":
            return held, ObjectNotFoundError if held is None else None
        if verb == "delete":
            if held is not None:
                del objects[key]
                self._changed(actor, key, held, None)
        elif verb == "create" and held is not None:
            return None, ObjectExistsError
        else:
            objects[key] = data
            if held != data:
                self._changed(actor, key, held, data)
        return None, None

    def _changed(self, actor: str, key: str, before: bytes | None, after: bytes | None) -> None:
        if self.watch is not None and not self._is_over:
            self.watch.changed(actor, key, before, after)

    def _list_page(self, prefix: str, after: str) -> tuple[list[ObjectInfo], str | None]:
        """The next objects of a listing, and where the page after them begins, if there is one."""
        objects = self.objects
        keys = [key for key in objects if key.startswith(prefix)]
        more = None
        if self._page is not None:
            keys = sorted(key for key in keys if key > after)
            if len(keys) > self._page:
                keys = keys[: self._page]
                more = keys[-1]
        elif self._lists_backwards:
            keys.reverse()
        return [_info(key, objects[key]) for key in keys], more


class SimulatedStore(VirtualStore):
    """The store of a world, as whoever is running in it sees it."""

    def __init__(self, world: World) -> None:
        super().__init__(())
        self._world = world

    def list(
        self, prefix: str = "", *, recursive: bool = True, **_: object
    ) -> Iterator[ObjectInfo]:
        assert recursive
        folder = prefix.strip("/")
        after: str | None = ""
        while after is not None:
            request = Request("list", f"{folder}/" if folder else "", after.encode())
            page, after = self._ask(request)
            yield from page

    def list_folders(self, prefix: str = "", **_: object) -> Iterator[str]:
        base = f"{prefix.strip('/')}/".lstrip("/")
        found = {
            base + item.key.removeprefix(base).partition("/")[0]: None for item in self.list(prefix)
        }
        yield from (folder for folder in found if folder not in self._world.objects)

    def read_many(
        self, keys: Iterable[str], threads: int = 8
    ) -> Iterator[tuple[str, bytes | StorageError]]:
        keys = list(keys)
        order = list(range(len(keys)))
        self._world.rng.shuffle(order)
        found = {place: self._try_read(keys[place]) for place in order}
        for place, key in enumerate(keys):
            yield key, found[place]

    def _ask(self, request: Request) -> object:
        return self._world.ask(request)


class _Carrier:
    """A thread that carries one client after another; making threads is dear."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.turn.acquire()
        self.work: tuple[World, Client] | None = None
        threading.Thread(target=self._loop, name="simulated", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self.turn.acquire()
            assert self.work is not None
            world, client = self.work
            world._run(client)
            self.work = None
            # Idle before the handover: whoever is next may need a thread at once.
            _idle.append(self)
            world._pass_on(None)


_idle: list[_Carrier] = []


def _carrier() -> _Carrier:
    return _idle.pop() if _idle else _Carrier()


def _info(key: str, data: bytes) -> ObjectInfo:
    return ObjectInfo(key=key, size_bytes=len(data), etag="")


def _told(request: Request, value: object, error: type[StorageError] | None) -> object:
    if error is not None:
        raise error(f"virtual://job/{request.key}: simulated")
    return value
