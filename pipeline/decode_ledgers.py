"""What is asked of decoding children, and what became of each input: exactly one outcome."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pipeline.decode_messages import DecodeItem, DecodeRequest, Event, ProbeRequest
from pipeline.errors import ERROR_KINDS, ErrorKind, one_line
from pipeline.records import Asset, FrameRecord, ShardSpec, Slice, UInt8Array
from pipeline.sources.assets import AssetProbe, DecodeLimits
from pipeline.sources.capture import Capture
from pipeline.storage import StorageOptions
from pipeline.tables import DecodedShard

_MAX_MESSAGE_CHARS = 500
_INT64 = 1 << 63
# Microseconds at the end of the year 9999, beyond which readers of Parquet know no date.
_LAST_INSTANT_US = 253_402_300_799_999_999


@dataclass(frozen=True, kw_only=True)
class Death:
    """How a child died, and at which item of its request, if it had begun one."""

    kind: ErrorKind
    message: str
    item: int | None


class ShardLedger:
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

    def fail(self, place: int, death: Death) -> None:
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


class ProbeLedger:
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

    def fail(self, place: int, death: Death) -> None:
        """Give up an asset."""
        self._set_error(place, death.kind, death.message)

    def probes(self) -> list[AssetProbe]:
        """One per asset, in order."""
        return [self._probes[entry] for entry in range(len(self._assets))]

    def _set_error(self, entry: int, kind: ErrorKind, message: str) -> None:
        asset = self._assets[entry]
        self._probes[entry] = AssetProbe(asset=asset, error_kind=kind, error=message)


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
