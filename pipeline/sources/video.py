"""The timeline of a video: every frame's tick, by demuxing, and what its container lacks."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, cast

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from pipeline.errors import ErrorKind, InputError
from pipeline.geometry import Orientation
from pipeline.records import Asset
from pipeline.sources.assets import AssetProbe, DecodeLimits
from pipeline.sources.capture import capture_of_container
from pipeline.sources.containers import is_cut
from pipeline.sources.video_file import (
    Clock,
    Meter,
    Progress,
    needs_start,
    open_decoder,
    open_video,
    orientation_of,
    reason_of,
)

if TYPE_CHECKING:
    from av.packet import Packet  # generic in its stubs only
    from av.stream import Stream
    from av.video.frame import VideoFrame

_FIRST_FRAME_PACKETS = 600
# A container that claims to go on for this much longer than its packets do has been cut.
_CUT_S = 1.0
# Two days at 30 frames a second.
_MAX_FRAMES = 5_000_000


@dataclass(kw_only=True)
class Timeline:
    """What demuxing tells.

    Attributes:
        ticks: Of every frame that has one, sorted.
        keyframes: Of the keyframes among them, sorted.
        num_untimed: Frames without any time stamp.
        end_s: When the last packet of any stream ends.
        failure: Why demuxing came to an end before the file did.
    """

    ticks: list[int] = field(default_factory=list)
    keyframes: list[int] = field(default_factory=list)
    num_untimed: int = 0
    end_s: float = 0.0
    failure: str | None = None


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
        InputError: If it cannot be opened or decoded, or holds no frame at all.
    """
    with open_video(file, limits) as (container, stream):
        timeline = demux(container, stream, Meter(file, progress))
        time_base = cast("Fraction", stream.time_base)
        claims = _claims(container, stream)
        from_start = needs_start(stream)
        coded = stream.codec_context.width, stream.codec_context.height
        capture = capture_of_container(container.metadata)
    if not timeline.ticks and not claims.num_frames:
        raise _without_frames(timeline)
    missing = _missing(file, timeline, claims, lambda: _count_packets(file, limits, progress))
    if not timeline.ticks and not missing.count:
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
        needs_start=from_start,
        rotation_deg=orientation.rotation_deg,
        duration_s=_duration_s(timeline.ticks, time_base),
        capture=capture,
        promised_frames=claims.num_frames,
        num_missing=missing.count,
        missing_kind=missing.kind,
        missing_error=missing.error,
    )


def _without_frames(timeline: Timeline) -> InputError:
    if timeline.failure is not None:
        return InputError("corrupt", timeline.failure)
    if timeline.num_untimed:
        return InputError("unsupported", "the video's frames have no time stamps")
    return InputError("truncated", "the video holds no frames")


def demux(container: InputContainer, stream: VideoStream, meter: Meter) -> Timeline:
    """Read all packets of an opened video.

    Raises:
        InputError: If there are too many.
    """
    timeline, clock = Timeline(), Clock(container, stream)
    try:
        for packet in meter.metered(container.demux()):
            if not packet.size:
                continue
            timeline.end_s = max(timeline.end_s, _end_s(packet))
            if packet.stream_index != stream.index or packet.is_discard:
                continue
            tick = clock.tick_of(cast("Packet[VideoStream]", packet))
            if tick is None:
                timeline.num_untimed += 1
                continue
            timeline.ticks.append(tick)
            if len(timeline.ticks) > _MAX_FRAMES:
                raise InputError("too_large", f"the video has more than {_MAX_FRAMES} frames")
            if packet.is_keyframe:
                timeline.keyframes.append(tick)
    except MemoryError:
        raise
    except av.FFmpegError as error:
        timeline.failure = reason_of(error)
    timeline.ticks.sort()
    timeline.keyframes.sort()
    return timeline


def _end_s(packet: "Packet[Stream]") -> float:
    time = packet.pts if packet.pts is not None else packet.dts
    if time is None or packet.time_base is None:
        return 0.0
    return float((time + (packet.duration or 0)) * packet.time_base)


@dataclass(frozen=True)
class _Claims:
    """What a container says of itself.

    Attributes:
        num_frames: Of the video stream; None if nothing exact is said.
        duration_s: Of all streams; 0 if nothing is said.
        is_by_rank: Whether ticks are places in the stream, those of dropped frames included.
    """

    num_frames: int | None
    duration_s: float
    is_by_rank: bool


@dataclass(frozen=True)
class _Missing:
    """Frames that are promised or evident and cannot be demuxed.

    Attributes:
        count: How many; one if nobody knows.
        kind: Their kind of error.
        error: The message that goes with it.
    """

    count: int = 0
    kind: ErrorKind | None = None
    error: str | None = None


def _claims(container: InputContainer, stream: VideoStream) -> _Claims:
    """An MP4's or MOV's sample table counts its frames, and so does an AVI's header."""
    name, rate = container.format.name, stream.average_rate
    is_by_rank = name == "avi" and bool(rate) and stream.time_base == 1 / Fraction(rate or 1)
    counts = name.startswith("mov") or is_by_rank
    return _Claims(
        num_frames=(stream.frames or None) if counts else None,
        duration_s=(container.duration or 0) / av.time_base,
        is_by_rank=is_by_rank,
    )


def _missing(
    file: BinaryIO, timeline: Timeline, claims: _Claims, count_packets: Callable[[], int]
) -> _Missing:
    num_untimed, untimed = timeline.num_untimed, ""
    if num_untimed:
        untimed = f"{num_untimed} of its frames have no time stamp"
    lost = _lost(file, timeline, claims, count_packets)
    if lost.kind is None:
        return _Missing(num_untimed, "unsupported", untimed) if num_untimed else lost
    error = f"{lost.error}; {untimed}" if num_untimed else lost.error
    return replace(lost, count=lost.count + num_untimed, error=error)


def _lost(
    file: BinaryIO, timeline: Timeline, claims: _Claims, count_packets: Callable[[], int]
) -> _Missing:
    """What is lost of the file."""
    promised, present = claims.num_frames, len(timeline.ticks)
    if claims.is_by_rank and timeline.ticks:
        present = max(present, timeline.ticks[-1] + 1)
    if promised is not None and promised > present:
        # An edit list may leave frames out on purpose.
        present = max(present, count_packets())
        if promised > present:
            message = f"the container promises {promised} frames, {present} can be read"
            return _Missing(promised - present, "count_mismatch", message)
    if timeline.failure is not None:
        return _Missing(1, "corrupt", f"the video cannot be read further: {timeline.failure}")
    if promised is not None:
        return _Missing()
    if timeline.end_s < claims.duration_s - _CUT_S:
        promise = f"the header promises {claims.duration_s:.1f} s"
        return _Missing(1, "truncated", f"{promise}, the video ends at {timeline.end_s:.1f} s")
    if is_cut(file):
        return _Missing(1, "truncated", "the file ends before its last part does")
    return _Missing()


def _count_packets(file: BinaryIO, limits: DecodeLimits, progress: Progress) -> int:
    count = 0
    with open_video(file, limits, ignore_editlist="1") as (container, stream):
        try:
            for packet in Meter(file, progress).metered(container.demux(stream)):
                count += packet.size > 0
        except av.FFmpegError:
            return count
    return count


def _first_frame(
    file: BinaryIO, limits: DecodeLimits, progress: Progress
) -> tuple[tuple[int, int] | None, Orientation]:
    """Coded size and orientation of the first frame that decodes, if one does soon.

    Raises:
        InputError: If none ever will.
    """
    with open_video(file, limits) as (container, stream):
        open_decoder(stream)
        try:
            for packet in islice(container.demux(stream), _FIRST_FRAME_PACKETS):
                progress()
                frames: list[VideoFrame] = []
                with suppress(av.FFmpegError):
                    frames = packet.decode()
                if frames:
                    frame = frames[0]
                    return (frame.width, frame.height), orientation_of(frame)
        except av.FFmpegError:
            return None, Orientation()
    return None, Orientation()


def _duration_s(ticks: Sequence[int], time_base: Fraction) -> float:
    """From the first frame to the end of the last, which lasts as long as the average one."""
    if len(ticks) < 2:
        return 0.0
    span = (ticks[-1] - ticks[0]) * time_base
    return float(span * len(ticks) / (len(ticks) - 1))
