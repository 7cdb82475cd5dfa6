"""The wanted frames of a video, each with exactly one outcome. Runs in the decoding child only."""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

import av
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from pipeline.errors import ErrorKind
from pipeline.geometry import UInt8Array
from pipeline.sources.assets import DecodeLimits
from pipeline.sources.decode_order import DecodeOrder
from pipeline.sources.video import demux
from pipeline.sources.video_file import (
    Clock,
    Meter,
    Progress,
    decode_packet,
    open_video,
    orientation_of,
    reason_of,
)

if TYPE_CHECKING:
    from av.packet import Packet, PacketSideData  # the first is generic in its stubs only
    from av.video.frame import VideoFrame

# How far before a keyframe to seek, in seconds, where the container's seek lands behind it.
_SEEK_BACK_S = (0, 2, 10, 60)
# No more pictures than that come out before one that they refer to (H.264 and H.265 hold 16).
_MOST_HELD = 17
_DAMAGED = "the frame's data, or a frame that it refers to, is damaged"

# By tick, and by how many frames of the same tick come out before: the place among the wanted.
_Todo = dict[int, dict[int, int]]


@dataclass(frozen=True, kw_only=True)
class FrameOutcome:
    """What became of one wanted frame.

    Attributes:
        position: Its place among the wanted ticks.
        pixels: Upright RGB at the asset's size; None if there is an error.
        error_kind: Set if it could not be had.
        error: The message that goes with it.
    """

    position: int
    pixels: UInt8Array | None = None
    error_kind: ErrorKind | None = None
    error: str | None = None


def read_frames(
    file: BinaryIO,
    wanted: Sequence[int],
    seek_pts: int | None,
    size: tuple[int, int],
    limits: DecodeLimits,
    progress: Progress,
    *,
    ranks: Sequence[int] | None = None,
) -> Iterator[FrameOutcome]:
    """Decode the frames of the wanted ticks; each gets exactly one outcome, in no promised order.

    A first pass starts at ``seek_pts``. Where the container's seek lands behind it, or frames seem
    damaged (perhaps for want of what stands before an open group of pictures), the next starts
    earlier; where frames are missing although nothing was damaged, a last one reads the file from
    its beginning.

    Args:
        file: The video.
        wanted: Ticks in presentation order.
        seek_pts: Tick of the keyframe to start at; None to read from the beginning, as where time
            stamps repeat or there is a palette.
        size: Width and height that the upright frames must have.
        limits: Bounds of its size.
        progress: Called for every packet.
        ranks: Place of each wanted frame among all of the video, in presentation order, which
            tells frames of one tick apart; None if all of each tick are wanted.

    Raises:
        InputError: If the video cannot be opened.
    """
    by_rank = ranks if seek_pts is None else None
    todo = _todo(wanted, by_rank, _ticks(file, limits, progress) if by_rank else ())
    attempt = 0
    while True:
        with open_video(file, limits) as (container, stream):
            target = _seek_target(stream, seek_pts, attempt)
            run = _Pass(container, stream, size, Meter(file, progress))
            yield from run.frames(todo, target)
        if not todo or target is None or (attempt and run.is_damaged):
            break
        is_cut_off = run.is_late or run.is_damaged
        attempt = attempt + 1 if is_cut_off else len(_SEEK_BACK_S)
    for tick, positions in todo.items():
        kind, message = run.verdict(tick, max(todo))
        for position in positions.values():
            yield FrameOutcome(position=position, error_kind=kind, error=message)


def _ticks(file: BinaryIO, limits: DecodeLimits, progress: Progress) -> list[int]:
    with open_video(file, limits) as (container, stream):
        return demux(container, stream, Meter(file, progress)).ticks


def _todo(wanted: Sequence[int], ranks: Sequence[int] | None, ticks: Sequence[int]) -> _Todo:
    todo: _Todo = {}
    for position, tick in enumerate(wanted):
        of_tick = todo.setdefault(tick, {})
        number = len(of_tick) if ranks is None else ranks[position] - bisect_left(ticks, tick)
        of_tick[number] = position
    return todo


def _seek_target(stream: VideoStream, seek_pts: int | None, attempt: int) -> int | None:
    if seek_pts is None or attempt >= len(_SEEK_BACK_S) or stream.time_base is None:
        return None
    return seek_pts - int(_SEEK_BACK_S[attempt] / stream.time_base)


class _Pass:
    """One run through a video's packets, from a keyframe on."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        size: tuple[int, int],
        meter: Meter,
    ) -> None:
        self.is_late = False
        self.failure: str | None = None
        self.suspects: set[int] = set()
        self._container = container
        self._stream = stream
        self._size = size
        self._meter = meter
        self._clock = Clock(container, stream)
        self._order = DecodeOrder()
        self._reformatter = VideoReformatter()
        self._has_begun = False
        self._first_keyframe: int | None = None
        self._seen: set[int] = set()
        self._newest: int | None = None
        self._palette: PacketSideData | None = None
        self._is_poisoned = False
        self._poisoned_before: int | None = None

    @property
    def is_damaged(self) -> bool:
        """Whether anything that was read is damaged."""
        return self.failure is not None or bool(self.suspects)

    def frames(self, todo: _Todo, target: int | None) -> Iterator[FrameOutcome]:
        """Decode until ``todo`` is empty, taking out of it what is found."""
        first, last = min(todo), max(todo)
        if target is not None and not self._reach(target, first):
            self.is_late = True
            return
        held: deque[tuple[int, int, VideoFrame]] = deque()
        came: Counter[int] = Counter()
        for frame in self._decoded(None if target is None else first):
            tick = self._clock.tick_of(frame)
            if tick is None:
                continue
            if frame.is_corrupt:
                self._blame(tick)
            self._order.come(tick)
            if came[tick] in todo.get(tick, ()):
                held.append((tick, came[tick], frame))
            came[tick] += 1
            # What one refers to may be found damaged after it came out.
            while held and (self._order.is_settled(held[0][0]) or len(held) > _MOST_HELD):
                yield from self._outcomes(held.popleft(), todo)
            if not todo or (target is not None and tick > last and not held):
                return
        for item in held:
            yield from self._outcomes(item, todo)

    def verdict(self, tick: int, last_wanted: int) -> tuple[ErrorKind, str]:
        """Why the frame of that tick did not come out."""
        if tick in self.suspects:
            return "corrupt", _DAMAGED
        ended_early = not self._seen or max(self._seen) < last_wanted
        if tick == self._newest or (ended_early and tick not in self._seen):
            reason = f": {self.failure}" if self.failure else ""
            return "truncated", f"the video ends before this frame{reason}"
        return "count_mismatch", "the decoder gave no frame for this time stamp"

    def _reach(self, target: int, first_wanted: int) -> bool:
        if not self._seek(target):
            return False
        if not self._clock.by_rank:
            return True
        leading = self._leading()
        if leading is None or leading.tick + leading.count > first_wanted:
            return False
        self._clock.skip(leading.count)
        return self._seek(target)

    def _seek(self, target: int) -> bool:
        try:
            self._container.seek(target, stream=self._stream)
        except av.FFmpegError:
            return False
        return True

    def _leading(self) -> "_Leading | None":
        """What the decoder leaves out behind the keyframe, for want of what stands before it.

        Where frames are known by their rank only, it shifts all others.
        """
        tick: int | None = None
        num_sent = num_out = 0
        try:
            for packet in self._meter.metered(self._container.demux(self._stream)):
                if not packet.size or (packet.is_keyframe and num_sent):
                    break
                if not num_sent and not packet.is_keyframe:
                    continue
                tick = self._clock.tick_of(packet) if tick is None else tick
                num_sent += 1
                num_out += len(packet.decode())
        except MemoryError:
            raise
        except av.FFmpegError:
            return None
        num_out += len(self._flush())
        return None if tick is None else _Leading(tick, max(0, num_sent - num_out))

    def _decoded(self, first_wanted: int | None) -> "Iterator[VideoFrame]":
        try:
            for packet in self._meter.metered(self._container.demux(self._stream)):
                tick = self._clock.tick_of(packet) if packet.size else None
                self._carry_palette(packet)
                if not self._has_begun and packet.size:
                    if not packet.is_keyframe:
                        continue
                    self._has_begun, self._first_keyframe = True, tick
                    if first_wanted is not None and tick is not None and tick > first_wanted:
                        self.is_late = True
                        return
                yield from self._decode(packet, tick)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            # Only from demuxing; what the decoder still holds comes out.
            self.failure = reason_of(error)
            yield from self._flush()

    def _decode(self, packet: "Packet[VideoStream]", tick: int | None) -> "list[VideoFrame]":
        if not packet.size:
            return self._flush()
        if tick is not None:
            self._suspect(packet, tick)
            self._clock.send(packet, tick)
            self._order.send(tick, is_keyframe=packet.is_keyframe)
        elif self._clock.by_rank:
            return []
        # One without a tick is nobody's frame, but others refer to it.
        if not packet.is_corrupt:
            try:
                frames = decode_packet(packet)
                self._palette = None
                return frames
            except MemoryError:
                raise
            except av.FFmpegError as error:
                if _is_harmless(error):
                    return []
        self._damage(packet, tick)
        return []

    def _carry_palette(self, packet: "Packet[VideoStream]") -> None:
        """It comes once: if nothing came of its packet, it goes with the next one."""
        if packet.has_sidedata("palette"):
            self._palette = packet.get_sidedata("palette")
        elif self._palette is not None and packet.size:
            packet.set_sidedata(self._palette)

    def _flush(self) -> "list[VideoFrame]":
        try:
            return self._stream.codec_context.decode(None)
        except MemoryError:
            raise
        except av.FFmpegError:
            return []

    def _suspect(self, packet: "Packet[VideoStream]", tick: int) -> None:
        """After damage, what comes out is wrong in silence until the next keyframe."""
        self._newest = tick
        self._seen.add(tick)
        if packet.is_keyframe:
            self._poisoned_before = tick if self._is_poisoned else None
            self._is_poisoned = False
        leads = self._poisoned_before is not None and tick < self._poisoned_before
        if self._is_poisoned or leads:
            self.suspects.add(tick)

    def _damage(self, packet: "Packet[VideoStream]", tick: int | None) -> None:
        if tick is not None:
            self._clock.lose(tick)
            self._order.come(tick)
            if self._leads_the_first(tick):
                return
            self.suspects.add(tick)
        if not packet.is_disposable:
            self._is_poisoned = True

    def _blame(self, tick: int) -> None:
        """Of a frame that came out damaged: all that may refer to it are, until a keyframe."""
        self.suspects.add(tick)
        if self._leads_the_first(tick):
            return
        later, keyframe = self._order.after(tick)
        self.suspects.update(later)
        if keyframe is None:
            self._is_poisoned = True
        elif self._order.is_newest_keyframe(keyframe):
            self._poisoned_before = keyframe

    def _leads_the_first(self, tick: int) -> bool:
        """Whether it is an open group's leading picture, which belongs to the interval before."""
        return self._first_keyframe is not None and tick < self._first_keyframe

    def _outcomes(self, item: "tuple[int, int, VideoFrame]", todo: _Todo) -> Iterator[FrameOutcome]:
        tick, number, frame = item
        if tick in self.suspects:
            return
        position = todo[tick].pop(number)
        if not todo[tick]:
            del todo[tick]
        yield self._outcome(position, frame)

    def _outcome(self, position: int, frame: "VideoFrame") -> FrameOutcome:
        # One thread: libswscale would start some for every frame.
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        pixels = orientation_of(frame).apply(cast("UInt8Array", rgb))
        size = pixels.shape[1], pixels.shape[0]
        if size != self._size:
            message = f"the frame is {size[0]}x{size[1]}, not {self._size[0]}x{self._size[1]}"
            return FrameOutcome(position=position, error_kind="unsupported", error=message)
        return FrameOutcome(position=position, pixels=pixels)


@dataclass(frozen=True)
class _Leading:
    """Pictures that were left out.

    Attributes:
        tick: Of the keyframe: the first rank of theirs.
        count: How many.
    """

    tick: int
    count: int


def _is_harmless(error: av.FFmpegError) -> bool:
    """Whether the decoder only missed a reference that it was told to forget, as after a cut."""
    log = cast("tuple[int, str, str] | None", error.log)
    return log is not None and log[2].startswith("mmco:")
