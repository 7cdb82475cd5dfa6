"""Model checking over real code: a store in memory whose every request is a scheduling point.

A program is any function of a store. It runs until it asks for something that has no answer yet;
what it asks is then known, and the explorer chooses what happens next and runs it again from its
start with one answer more. So a program's place is its answers so far, no thread is needed, and
two schedules that lead to equal stores, places and messages on their way are explored once from
there on. This loses nothing, because rules look at single steps and at places, never at a path.

Modelled: requests in every order; a client that stops for ever before any request or before it
hears the answer; a request that fails without effect, that takes effect although it fails, that
takes effect at any time after its client was told that it failed, or that takes effect twice, now
and at any time after; a create that is refused, whether or not it took effect. Not modelled: a list
or a read that is not atomic, bytes that rot, a store that forgets, and requests of one client that
run in parallel (``read_many`` reads in turn).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import BinaryIO, Literal, NamedTuple, Protocol

from pipeline.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
)
from pipeline.storage import ObjectInfo, Store
from pipeline.storage.base import Data

Objects = dict[str, bytes]
Program = Callable[[Store], object]
Effect = Literal["none", "now", "later", "twice"]


class Request(NamedTuple):
    """What a program asks of the store."""

    verb: Literal["read", "head", "list", "put", "create", "delete"]
    key: str
    data: bytes = b""

    @property
    def is_write(self) -> bool:
        return self.verb in {"put", "create", "delete"}


class Answer(NamedTuple):
    """What the program hears."""

    value: bytes | ObjectInfo | tuple[ObjectInfo, ...] | None = None
    error: type[StorageError] | None = None


class Packet(NamedTuple):
    """A write that is still on its way."""

    sender: int
    request: Request


def perform(request: Request, objects: Objects) -> tuple[Objects, Answer]:
    """The objects after a request, and its honest answer."""
    verb, key, data = request
    held = objects.get(key)
    if verb == "list":
        keys = sorted(name for name in objects if name.startswith(key))
        return objects, Answer(tuple(_info(name, objects[name]) for name in keys))
    if verb == "head":
        return objects, Answer(None if held is None else _info(key, held))
    if verb == "read":
        return objects, Answer(held, ObjectNotFoundError if held is None else None)
    if verb == "delete":
        return {name: objects[name] for name in objects if name != key}, Answer()
    if verb == "create" and held is not None:
        return objects, Answer(error=ObjectExistsError)
    return {**objects, key: data}, Answer()


def mishaps(request: Request) -> Iterator[tuple[Effect, type[StorageError] | None]]:
    """How a request can go wrong: what becomes of it, and the error that its client is told."""
    yield "none", StoreUnavailableError
    if request.is_write:
        yield "now", StoreUnavailableError
        yield "later", StoreUnavailableError
        yield "twice", None  # the client library tried again; the first packet was only slow
    if request.verb == "create":
        yield "now", ObjectExistsError  # a retried conditional write fails on its own success
        yield "none", ObjectExistsError  # S3's 409: refused while another's was on its way


class VirtualStore(Store):
    """Repeats the answers of ``history``, then suspends the program at its next request."""

    url = "virtual://job"

    def __init__(self, history: Sequence[tuple[Request, Answer]]) -> None:
        self._history = iter(history)

    def read(self, key: str) -> bytes:
        value = self._ask(Request("read", key))
        assert isinstance(value, bytes)
        return value

    def head(self, key: str) -> ObjectInfo | None:
        value = self._ask(Request("head", key))
        assert value is None or isinstance(value, ObjectInfo)
        return value

    def put(self, key: str, data: Data) -> None:
        self._ask(Request("put", key, bytes(data)))

    def create(self, key: str, data: Data) -> None:
        self._ask(Request("create", key, bytes(data)))

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[ObjectInfo]:
        assert recursive
        folder = prefix.strip("/")
        value = self._ask(Request("list", f"{folder}/" if folder else ""))
        assert isinstance(value, tuple)
        yield from value

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._ask(Request("delete", key))

    def read_many(
        self, keys: Iterable[str], threads: int = 8
    ) -> Iterator[tuple[str, bytes | StorageError]]:
        for key in keys:
            yield key, self._try_read(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        raise NotImplementedError

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        raise NotImplementedError

    def open_seekable(self, key: str) -> BinaryIO:
        raise NotImplementedError

    def fingerprint(self, key: str) -> str:
        raise NotImplementedError

    def _ask(self, request: Request) -> object:
        before, answer = next(self._history, (None, None))
        if answer is None:
            raise _SuspendedError(request)
        if before != request:
            raise _NotDeterministicError(f"asked {before} at first, now {request}")
        if answer.error is not None:
            raise answer.error(f"{self.url}/{request.key}: injected")
        return answer.value


# Neither is an Exception: the code under test catches those.
class _SuspendedError(BaseException):
    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.request = request


class _NotDeterministicError(BaseException):
    pass


class Place:
    """Where a program stands after some answers: at its next request, or at its end.

    Attributes:
        request: What it asks next; None at its end.
        result: What it returned.
        error: What it raised.
    """

    def __init__(self, program: Program, history: tuple[tuple[Request, Answer], ...] = ()) -> None:
        self._program, self._history = program, history
        self._next: dict[Answer, Place] = {}
        self.request: Request | None = None
        self.result: object = None
        self.error: Exception | None = None
        try:
            self.result = program(VirtualStore(history))
        except _SuspendedError as suspended:
            self.request = suspended.request
        except Exception as error:  # noqa: BLE001 - how a program ends is for the rules to judge
            self.error = error

    def after(self, answer: Answer) -> "Place":
        """The place that this answer leads to, always the same object."""
        assert self.request is not None
        if answer not in self._next:
            history = (*self._history, (self.request, answer))
            self._next[answer] = Place(self._program, history)
        return self._next[answer]


class Rules(Protocol):
    """What must hold; each method yields the names of the rules that are broken."""

    def step(self, actor: str, before: Objects, after: Objects) -> Iterator[str]:
        """A request of ``actor`` took effect."""

    def end(self, actor: str, place: Place, objects: Objects, *, faultless: bool) -> Iterator[str]:
        """A program has just ended."""

    def rest(self, place: Place, objects: Objects, late: frozenset[str]) -> Iterator[str]:
        """The aftermath has ended, and after it packets for the keys ``late`` have arrived."""


class State(NamedTuple):
    """Everything that the future depends on; a place of None is a client that has crashed."""

    objects: frozenset[tuple[str, bytes]]
    places: tuple[Place | None, ...]
    packets: tuple[Packet, ...]
    faults_left: int


class Move(NamedTuple):
    """One thing that can happen in a state: to a request, or to its client if that is None."""

    actor: str
    request: Request | None
    fate: str
    state: State

    def __str__(self) -> str:
        asked = f"{self.request.verb} {self.request.key}" if self.request else ""
        return " ".join(filter(None, (f"{self.actor}:", asked, self.fate)))


@dataclass(kw_only=True)
class Explorer:
    """Depth-first search over every schedule of some programs.

    Args:
        programs: The clients that run at the same time, by name.
        aftermath: Runs undisturbed once they have all ended or crashed.
        rules: What must hold.
        num_faults: How many crashes and mishaps one schedule may have, together.
        merge: Whether to explore what follows equal states once; False walks every schedule.

    Attributes:
        violations: For each rule that was broken, one schedule that breaks it.
        num_states: Distinct states that were visited.
    """

    programs: Mapping[str, Program]
    aftermath: Program
    rules: Rules
    num_faults: int
    merge: bool = True
    violations: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names = list(self.programs)
        self._path: list[Move] = []
        self._executions: dict[State, int] = {}
        self._aftermath = Place(self.aftermath)
        self._broken_after: dict[tuple[object, ...], list[str]] = {}

    @property
    def num_states(self) -> int:
        return len(self._executions)

    def run(self) -> int:
        """Explore, and return the number of schedules that were covered, start to end."""
        places = tuple(Place(program) for program in self.programs.values())
        return self._visit(State(frozenset(), places, (), self.num_faults))

    def _visit(self, state: State) -> int:
        if self.merge and state in self._executions:
            return self._executions[state]
        executions = 0
        objects = dict(state.objects)
        for move in self._moves(state, objects):
            self._path.append(move)
            broken = list(self._broken(state, objects, move))
            self._note(broken)
            executions += 1 if broken else self._visit(move.state)
            self._path.pop()
        if all(place is None or place.request is None for place in state.places):
            executions += 1
            self._note(self._settle(state, objects))
        self._executions[state] = executions
        return executions

    def _moves(self, state: State, objects: Objects) -> Iterator[Move]:
        for index, place in enumerate(state.places):
            if place is None or place.request is None:
                continue
            name, request = self._names[index], place.request
            after, honest = perform(request, objects)
            done = state._replace(objects=frozenset(after.items()))
            yield Move(name, request, "", _put_at(done, index, place.after(honest)))
            if not state.faults_left:
                continue
            kept = state._replace(faults_left=state.faults_left - 1)
            yield Move(name, None, "crashes", _put_at(kept, index, None))
            packets = tuple(sorted((*state.packets, Packet(index, request))))
            become = {
                "none": kept,
                "now": kept._replace(objects=done.objects),
                "later": kept._replace(packets=packets),
                "twice": kept._replace(objects=done.objects, packets=packets),
            }
            for effect, error in mishaps(request):
                told = Answer(error=error) if error else honest
                fate = f"(effect: {effect}, told: {error.__name__ if error else 'the truth'})"
                yield Move(name, request, fate, _put_at(become[effect], index, place.after(told)))
        for packet in dict.fromkeys(state.packets):
            after, _ = perform(packet.request, objects)
            rest = list(state.packets)
            rest.remove(packet)
            arrived = state._replace(objects=frozenset(after.items()), packets=tuple(rest))
            yield Move(self._names[packet.sender], packet.request, "(arrives late)", arrived)

    def _broken(self, before: State, objects: Objects, move: Move) -> Iterator[str]:
        after = dict(move.state.objects)
        if move.state.objects != before.objects:
            yield from self.rules.step(move.actor, objects, after)
        faultless = move.state.faults_left == self.num_faults
        for old, place in zip(before.places, move.state.places, strict=True):
            if place is not None and place is not old and place.request is None:
                yield from self.rules.end(move.actor, place, after, faultless=faultless)

    def _settle(self, state: State, objects: Objects) -> list[str]:
        key = (state.objects, state.packets)
        if key not in self._broken_after:
            self._broken_after[key] = list(self._aftermath_broken(state.packets, objects))
        return self._broken_after[key]

    def _aftermath_broken(self, packets: tuple[Packet, ...], objects: Objects) -> Iterator[str]:
        place = self._aftermath
        while place.request is not None:
            after, answer = perform(place.request, objects)
            yield from self.rules.step("aftermath", objects, after)
            place, objects = place.after(answer), after
        yield from self.rules.end("aftermath", place, objects, faultless=True)
        yield from self.rules.rest(place, objects, frozenset())
        late = frozenset(packet.request.key for packet in packets)
        for order in permutations(packets):
            now = objects
            for packet in order:
                after, _ = perform(packet.request, now)
                yield from self.rules.step(self._names[packet.sender], now, after)
                now = after
            yield from self.rules.rest(place, now, late)

    def _note(self, broken: Iterable[str]) -> None:
        for rule in broken:
            if rule not in self.violations:
                self.violations[rule] = tuple(map(str, self._path))


def _info(key: str, data: bytes) -> ObjectInfo:
    return ObjectInfo(key=key, size_bytes=len(data), etag="")


def _put_at(state: State, index: int, place: Place | None) -> State:
    return state._replace(places=(*state.places[:index], place, *state.places[index + 1 :]))
