"""Videos through PyAV: a demux that gives the timeline, and the decoding of wanted frames.

Runs in the decoding child only. A frame is known by its tick: the presentation time stamp of its
packet, or the decoding time stamp where it has none. AVI stores no presentation times, so there
the k-th frame that comes out gets the k-th decoding time stamp. The rule that is recorded: the
first video stream that is no cover picture; RGB by libswscale at the coded size, 8 bits per
channel; the display matrix is applied, the pixel aspect ratio is not; fields stay interlaced.
"""

import logging
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from errno import EINVAL
from fractions import Fraction
from heapq import heapify, heappop, heappush
from io import SEEK_END, SEEK_SET
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import av
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from pipeline.errors import ErrorKind, InputError
from pipeline.geometry import Orientation, UInt8Array
from pipeline.records import Asset
from pipeline.sources.assets import AssetProbe, DecodeLimits, check_pixels
from pipeline.sources.capture import capture_of_container

if TYPE_CHECKING:
    from av.packet import Packet  # generic in its stubs only

Progress = Callable[[], None]

# Playlists and other formats that name further files are not in the list.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,avi"
_BUFFER_BYTES = 256 * 1024
# How far before a keyframe to seek, in seconds, where the container's seek lands behind it.
_SEEK_BACK_S = (0, 2, 10, 60)
_FIRST_FRAME_PACKETS = 600
# A container that claims to go on for this much longer than its packets do has been cut.
_CUT_S = 1.0
_MAX_BOXES = 10_000
# Two days at 30 frames a second.
_MAX_FRAMES = 5_000_000
# A container's packets are parts of its file, but its index may name one part again and again.
_MAX_PACKET_BYTES_PER_FILE_BYTE = 16
_SMALL_FILE_BYTES = 1 << 20
_DAMAGED = "the frame's data, or a frame that it refers to, is damaged"


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


@dataclass(kw_only=True)
class _Timeline:
    ticks: list[int] = field(default_factory=list)
    keyframes: list[int] = field(default_factory=list)
    end_s: float = 0.0
    failure: str | None = None


def quiet_ffmpeg() -> None:
    """Keep messages for the exceptions that they come with, and print them nowhere."""
    av.logging.set_level(av.logging.ERROR)
    logger = logging.getLogger("libav")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def probe_video(
    file: BinaryIO, asset: Asset, limits: DecodeLimits, progress: Progress
) -> AssetProbe:
    """Demux a whole video and decode its first frame.

    Args:
        file: The video.
        asset: What it is.
        limits: Bounds of its size.
        progress: Called for every packet.

    Raises:
        InputError: If it cannot be opened or holds no frame at all.
    """
    with _open(file, limits) as (container, stream):
        timeline = _demux(container, stream, progress, _Meter(file))
        time_base = cast("Fraction", stream.time_base)
        promised = _promised_frames(container, stream)
        container_s = (container.duration or 0) / av.time_base
        coded = stream.codec_context.width, stream.codec_context.height
        capture = capture_of_container(container.metadata)
    if not timeline.ticks and not promised:
        kind: ErrorKind = "corrupt" if timeline.failure else "truncated"
        raise InputError(kind, timeline.failure or "the video holds no frames")
    num_missing, missing_kind, missing_error = _missing(
        file, timeline, limits, progress, promised, container_s
    )
    if not timeline.ticks and not num_missing:
        # Without a frame to plan, the file would have no outcome at all.
        raise InputError("corrupt", "the container's edit list leaves every frame out")
    size, orientation = _first_frame(file, limits, progress)
    width, height = orientation.size(*(size or coded))
    return AssetProbe(
        asset=asset,
        width=width,
        height=height,
        pts=tuple(timeline.ticks),
        keyframe_pts=tuple(timeline.keyframes),
        time_base=time_base,
        rotation_deg=orientation.rotation_deg,
        duration_s=_duration_s(timeline.ticks, time_base),
        capture=capture,
        promised_frames=promised,
        num_missing=num_missing,
        missing_kind=missing_kind,
        missing_error=missing_error,
    )


def read_frames(
    file: BinaryIO,
    wanted: Sequence[int],
    seek_pts: int | None,
    size: tuple[int, int],
    limits: DecodeLimits,
    progress: Progress,
) -> Iterator[FrameOutcome]:
    """Decode the frames of the wanted ticks; each gets exactly one outcome, in no promised order.

    A first pass starts at ``seek_pts``. Where the container's seek lands behind it, or frames seem
    damaged (perhaps for want of what stands before an open group of pictures), the next starts
    earlier; where frames are missing although nothing was damaged, a last one reads the file from
    its beginning.

    Args:
        file: The video.
        wanted: Ticks in presentation order.
        seek_pts: Tick of the keyframe to start at.
        size: Width and height that the upright frames must have.
        limits: Bounds of its size.
        progress: Called for every packet.

    Raises:
        InputError: If the video cannot be opened.
    """
    todo: dict[int, list[int]] = {}
    for position, tick in enumerate(wanted):
        todo.setdefault(tick, []).append(position)
    attempt = 0
    while True:
        with _open(file, limits) as (container, stream):
            target = _seek_target(stream, seek_pts, attempt)
            run = _Pass(container, stream, size, progress, _Meter(file))
            yield from run.frames(todo, target)
        if not todo or target is None or (attempt and run.is_damaged):
            break
        is_cut_off = run.is_late or run.is_damaged
        attempt = attempt + 1 if is_cut_off else len(_SEEK_BACK_S)
    for tick, positions in todo.items():
        kind, message = run.verdict(tick, max(todo))
        for position in positions:
            yield FrameOutcome(position=position, error_kind=kind, error=message)


class _Pass:
    """One run through a video's packets, from a keyframe on."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        size: tuple[int, int],
        progress: Progress,
        meter: "_Meter",
    ) -> None:
        self.is_late = False
        self.failure: str | None = None
        self.suspects: set[int] = set()
        self._container = container
        self._stream = stream
        self._size = size
        self._progress = progress
        self._meter = meter
        self._clock = _Clock(container, stream)
        self._reformatter = VideoReformatter()
        self._first_keyframe: int | None = None
        self._seen: set[int] = set()
        self._newest: int | None = None
        self._is_poisoned = False
        self._poisoned_before: int | None = None

    @property
    def is_damaged(self) -> bool:
        """Whether anything that was read is damaged."""
        return self.failure is not None or bool(self.suspects)

    def frames(self, todo: dict[int, list[int]], target: int | None) -> Iterator[FrameOutcome]:
        """Decode until ``todo`` is empty, taking out of it what is found."""
        first, last = min(todo), max(todo)
        if target is not None and not self._seek(target):
            self.is_late = True
            return
        for frame in self._decoded(None if target is None else first):
            tick = self._clock.tick_of(frame)
            if tick is None:
                continue
            if frame.is_corrupt:
                self.suspects.add(tick)
            if tick not in self.suspects:
                for position in todo.pop(tick, ()):
                    yield self._outcome(position, frame)
            if not todo or (target is not None and tick > last):
                return

    def verdict(self, tick: int, last_wanted: int) -> tuple[ErrorKind, str]:
        """Why the frame of that tick did not come out."""
        if tick in self.suspects:
            return "corrupt", _DAMAGED
        ended_early = not self._seen or max(self._seen) < last_wanted
        if tick == self._newest or (ended_early and tick not in self._seen):
            reason = f": {self.failure}" if self.failure else ""
            return "truncated", f"the video ends before this frame{reason}"
        return "count_mismatch", "the decoder gave no frame for this time stamp"

    def _seek(self, target: int) -> bool:
        try:
            self._container.seek(target, stream=self._stream)
        except av.FFmpegError:
            return False
        return True

    def _decoded(self, first_wanted: int | None) -> Iterator[VideoFrame]:
        try:
            for packet in self._container.demux(self._stream):
                self._progress()
                self._meter.take(packet.size)
                tick = self._clock.tick_of(packet) if packet.size else None
                if self._first_keyframe is None and packet.size:
                    if tick is None or not packet.is_keyframe:
                        continue
                    self._first_keyframe = tick
                    if first_wanted is not None and tick > first_wanted:
                        self.is_late = True
                        return
                yield from self._decode(packet, tick)
        except av.FFmpegError as error:
            # Only from demuxing; what the decoder still holds comes out.
            self.failure = _reason(error)
            yield from self._flush()

    def _decode(self, packet: "Packet[VideoStream]", tick: int | None) -> list[VideoFrame]:
        if not packet.size:
            return self._flush()
        if tick is None:
            return []
        self._suspect(packet, tick)
        self._clock.send(packet, tick)
        if not packet.is_corrupt:
            try:
                return packet.decode()
            except MemoryError:
                raise
            except av.FFmpegError as error:
                if _is_harmless(error):
                    return []
        self._damage(packet, tick)
        return []

    def _flush(self) -> list[VideoFrame]:
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

    def _damage(self, packet: "Packet[VideoStream]", tick: int) -> None:
        self._clock.lose(tick)
        if self._first_keyframe is not None and tick < self._first_keyframe:
            return  # an open group's leading picture, which belongs to the interval before
        self.suspects.add(tick)
        if not packet.is_disposable:
            self._is_poisoned = True

    def _outcome(self, position: int, frame: VideoFrame) -> FrameOutcome:
        # One thread: libswscale would start some for every frame.
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        pixels = _orientation(frame).apply(cast("UInt8Array", rgb))
        size = pixels.shape[1], pixels.shape[0]
        if size != self._size:
            message = f"the frame is {size[0]}x{size[1]}, not {self._size[0]}x{self._size[1]}"
            return FrameOutcome(position=position, error_kind="unsupported", error=message)
        return FrameOutcome(position=position, pixels=pixels)


class _Clock:
    """Ticks of packets and of the frames that come of them."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._has_pts = container.format.name != "avi"
        self._by_rank = not self._has_pts and bool(stream.codec_context.has_b_frames)
        self._unassigned: list[int] = []

    def tick_of(self, item: "Packet[VideoStream] | VideoFrame") -> int | None:
        """The tick of a packet, or of a frame that came out; None if it has none."""
        if isinstance(item, VideoFrame):
            if self._by_rank:
                return heappop(self._unassigned) if self._unassigned else None
            return item.pts
        if self._has_pts and item.pts is not None:
            return item.pts
        return item.dts

    def send(self, packet: "Packet[VideoStream]", tick: int) -> None:
        """Make the decoder stamp the packet's frame with its tick."""
        packet.pts = tick
        if self._by_rank:
            heappush(self._unassigned, tick)

    def lose(self, tick: int) -> None:
        """No frame will come of that packet."""
        if self._by_rank:
            self._unassigned.remove(tick)
            heapify(self._unassigned)


class _Meter:
    """Counts what is demuxed of a file, which must not be many times the file.

    Args:
        file: The video.
    """

    def __init__(self, file: BinaryIO) -> None:
        place = file.tell()
        size_bytes = max(_SMALL_FILE_BYTES, file.seek(0, SEEK_END))
        file.seek(place)
        self._left_bytes = size_bytes * _MAX_PACKET_BYTES_PER_FILE_BYTE

    def take(self, packet_bytes: int) -> None:
        """Note one packet.

        Raises:
            InputError: If there is too much of them.
        """
        self._left_bytes -= packet_bytes
        if self._left_bytes < 0:
            raise InputError("corrupt", "the container's index names the same data many times")


class _Reader:
    """The file as FFmpeg sees it: a seek to nowhere, as damaged indexes ask for, just fails."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (ValueError, OverflowError):
            return -1
        except OSError as error:
            if error.errno != EINVAL:
                raise
            return -1

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _open(
    file: BinaryIO, limits: DecodeLimits, **options: str
) -> Iterator[tuple[InputContainer, VideoStream]]:
    if file.seek(0, SEEK_END) == 0:
        raise InputError("truncated", "the file is empty")
    file.seek(0)
    try:
        container = av.open(
            _Reader(file),
            mode="r",
            options={"format_whitelist": _FORMATS, **options},
            metadata_errors="replace",
            buffer_size=_BUFFER_BYTES,
        )
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise _unopenable(file, error) from error
    with container:
        yield container, _video_stream(container, limits)


def _video_stream(container: InputContainer, limits: DecodeLimits) -> VideoStream:
    streams = (s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
    stream = next(streams, None)
    if stream is None:
        raise InputError("unsupported", "there is no video stream")
    context = cast("Any", stream.codec_context)
    if context is None:
        raise InputError("unsupported", "no decoder for the video stream")
    check_pixels(context.width, context.height, limits)
    context.thread_type = "NONE"
    context.thread_count = 1
    # By default damaged slices are patched up in silence.
    context.options = {"err_detect": "+explode", "max_pixels": str(limits.max_pixels)}
    return stream


def _unopenable(file: BinaryIO, error: av.FFmpegError) -> InputError:
    boxes = _boxes(file)
    if boxes is not None and b"moov" not in boxes:
        return InputError("truncated", "the video ends before its index (no moov box)")
    return InputError("corrupt", f"the video cannot be opened: {_reason(error)}")


def _boxes(file: BinaryIO) -> list[bytes] | None:
    """Names of the top-level boxes of an MP4 or MOV; None for anything else."""
    names: list[bytes] = []
    position, end = 0, file.seek(0, SEEK_END)
    while position < end and len(names) < _MAX_BOXES:
        file.seek(position)
        head = file.read(16).ljust(16, b"\0")
        length, name = struct.unpack_from(">I4s", head)
        if not names and name != b"ftyp":
            return None
        names.append(name)
        if length == 1:
            (length,) = struct.unpack_from(">Q", head, 8)
        if length < 8:
            break
        position += length
    return names or None


def _demux(
    container: InputContainer, stream: VideoStream, progress: Progress, meter: _Meter
) -> _Timeline:
    timeline, clock = _Timeline(), _Clock(container, stream)
    try:
        for packet in container.demux():
            progress()
            meter.take(packet.size)
            if not packet.size:
                continue
            timeline.end_s = max(timeline.end_s, _end_s(packet))
            if packet.stream_index != stream.index or packet.is_discard:
                continue
            tick = clock.tick_of(cast("Packet[VideoStream]", packet))
            if tick is None:
                continue
            timeline.ticks.append(tick)
            if len(timeline.ticks) > _MAX_FRAMES:
                raise InputError("too_large", f"the video has more than {_MAX_FRAMES} frames")
            if packet.is_keyframe:
                timeline.keyframes.append(tick)
    except MemoryError:
        raise
    except av.FFmpegError as error:
        timeline.failure = _reason(error)
    timeline.ticks.sort()
    timeline.keyframes.sort()
    return timeline


def _end_s(packet: "Packet[Stream]") -> float:
    time = packet.pts if packet.pts is not None else packet.dts
    if time is None or packet.time_base is None:
        return 0.0
    return float((time + (packet.duration or 0)) * packet.time_base)


def _promised_frames(container: InputContainer, stream: VideoStream) -> int | None:
    """What an MP4's or MOV's sample table claims; other containers claim nothing exact."""
    return (stream.frames or None) if container.format.name.startswith("mov") else None


def _missing(
    file: BinaryIO,
    timeline: _Timeline,
    limits: DecodeLimits,
    progress: Progress,
    promised: int | None,
    container_s: float,
) -> tuple[int, ErrorKind | None, str | None]:
    num_frames = len(timeline.ticks)
    if promised is not None and promised > num_frames:
        # An edit list may leave frames out on purpose.
        present = max(num_frames, _count_packets(file, limits, progress))
        if promised > present:
            message = f"the container promises {promised} frames, {present} can be read"
            return promised - present, "count_mismatch", message
    if timeline.failure is not None:
        return 1, "corrupt", f"the video cannot be read further: {timeline.failure}"
    if promised is None and timeline.end_s < container_s - _CUT_S:
        message = (
            f"the header promises {container_s:.1f} s, the video ends at {timeline.end_s:.1f} s"
        )
        return 1, "truncated", message
    return 0, None, None


def _count_packets(file: BinaryIO, limits: DecodeLimits, progress: Progress) -> int:
    count = 0
    with _open(file, limits, ignore_editlist="1") as (container, stream):
        try:
            meter = _Meter(file)
            for packet in container.demux(stream):
                progress()
                meter.take(packet.size)
                count += packet.size > 0
        except av.FFmpegError:
            return count
    return count


def _first_frame(
    file: BinaryIO, limits: DecodeLimits, progress: Progress
) -> tuple[tuple[int, int] | None, Orientation]:
    """Coded size and orientation of the first frame that decodes, if one does soon."""
    with _open(file, limits) as (container, stream):
        try:
            for packet in islice(container.demux(stream), _FIRST_FRAME_PACKETS):
                progress()
                frames: list[VideoFrame] = []
                with suppress(av.FFmpegError):
                    frames = packet.decode()
                if frames:
                    frame = frames[0]
                    return (frame.width, frame.height), _orientation(frame)
        except av.FFmpegError:
            return None, Orientation()
    return None, Orientation()


def _seek_target(stream: VideoStream, seek_pts: int | None, attempt: int) -> int | None:
    if seek_pts is None or attempt >= len(_SEEK_BACK_S) or stream.time_base is None:
        return None
    return seek_pts - int(_SEEK_BACK_S[attempt] / stream.time_base)


def _orientation(frame: VideoFrame) -> Orientation:
    matrix = cast("Mapping[SideDataType, SideData]", frame.side_data).get(
        SideDataType.DISPLAYMATRIX
    )
    return Orientation() if matrix is None else Orientation.from_display_matrix(bytes(matrix))


def _duration_s(ticks: Sequence[int], time_base: Fraction) -> float:
    """From the first frame to the end of the last, which lasts as long as the average one."""
    if len(ticks) < 2:
        return 0.0
    span = (ticks[-1] - ticks[0]) * time_base
    return float(span * len(ticks) / (len(ticks) - 1))


def _is_harmless(error: av.FFmpegError) -> bool:
    """Whether the decoder only missed a reference that it was told to forget, as after a cut."""
    log = cast("tuple[int, str, str] | None", error.log)
    return log is not None and log[2].startswith("mmco:")


def _reason(error: av.FFmpegError) -> str:
    return error.strerror or type(error).__name__
