"""Opening a video through PyAV, and what its packets and frames are known by.

Runs in the decoding child only. A frame is known by its tick: the presentation time stamp of its
packet, or the decoding time stamp where it has none. AVI stores no presentation times, so there
the k-th frame that comes out gets the k-th decoding time stamp. The rule that is recorded: the
first video stream that is no cover picture; RGB by libswscale at the coded size (BT.601 of limited
range where no tag says otherwise, whatever the size), 8 bits per channel; the display matrix is
applied, the pixel aspect ratio is not; fields stay interlaced.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import EILSEQ, EINVAL
from heapq import heapify, heappop, heappush
from io import SEEK_END, SEEK_SET
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import av
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.errors import InputError
from pipeline.geometry import Orientation
from pipeline.sources import signatures
from pipeline.sources.assets import DecodeLimits, check_pixels
from pipeline.sources.containers import lacks_index

if TYPE_CHECKING:
    from av.packet import Packet  # generic in its stubs only

Progress = Callable[[], None]
AnyPacket = TypeVar("AnyPacket", bound="Packet[Any]")

# Playlists and other formats that name further files are not in the list.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,avi"
_BUFFER_BYTES = 256 * 1024
# A container's packets are parts of its file, but its index may name one part again and again.
_MAX_PACKET_BYTES_PER_FILE_BYTE = 16
_SMALL_FILE_BYTES = 1 << 20
# The most to which FFmpeg pads a picture's lines, and more than a codec's blocks measure.
_ALIGNMENT_PX = 64
# By default damaged slices are patched up in silence.
_STRICT = "+explode"
# These have their palette in each keyframe.
_OWN_PALETTE_CODECS = frozenset({"bmp", "gif", "png", "targa", "tiff", "zmbv"})
# Their decoders, if strict, refuse sound pictures for a tag that they do not know: these are asked
# to go on, and what they print of damage counts.
_REFUSING_CODECS = frozenset({"tiff"})


def _unlisted(kind: type[SideDataType], value: object) -> SideDataType:
    member = object.__new__(kind)
    member._name_, member._value_ = f"UNLISTED_{value}", cast("Any", value)
    return member


# PyAV gives nothing of what goes with a frame if one kind of it has no name there, as EXIF.
SideDataType._missing_ = classmethod(_unlisted)  # type: ignore[assignment]


def quiet_ffmpeg() -> None:
    """Keep messages for the exceptions that they come with, and print them nowhere."""
    av.logging.set_level(av.logging.ERROR)
    logger = logging.getLogger("libav")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


class Clock:
    """Ticks of packets and of the frames that come of them.

    Attributes:
        by_rank: Whether only the order in which frames come out gives theirs.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._has_pts = container.format.name != "avi"
        self.by_rank = not self._has_pts and bool(stream.codec_context.has_b_frames)
        self._unassigned: list[int] = []
        self._num_skipped = 0

    def tick_of(self, item: "Packet[VideoStream] | VideoFrame") -> int | None:
        """The tick of a packet, or of a frame that came out; None if it has none."""
        if isinstance(item, VideoFrame):
            return self._next_rank() if self.by_rank else item.pts
        if self._has_pts and item.pts is not None:
            return item.pts
        return item.dts

    def send(self, packet: "Packet[VideoStream]", tick: int) -> None:
        """Make the decoder stamp the packet's frame with its tick."""
        packet.pts = tick
        if self.by_rank:
            heappush(self._unassigned, tick)

    def lose(self, tick: int) -> None:
        """No frame will come of that packet."""
        if self.by_rank:
            self._unassigned.remove(tick)
            heapify(self._unassigned)

    def skip(self, count: int) -> None:
        """The first so many frames will not come out."""
        self._num_skipped = count

    def _next_rank(self) -> int | None:
        if len(self._unassigned) <= self._num_skipped:
            return None
        while self._num_skipped:
            heappop(self._unassigned)
            self._num_skipped -= 1
        return heappop(self._unassigned)


class Meter:
    """Counts what is demuxed of a file, which must not be many times the file.

    Args:
        file: The video.
        progress: Called for every packet.
    """

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._progress = progress
        place = file.tell()
        size_bytes = max(_SMALL_FILE_BYTES, file.seek(0, SEEK_END))
        file.seek(place)
        self._left_bytes = size_bytes * _MAX_PACKET_BYTES_PER_FILE_BYTE

    def metered(self, packets: Iterable[AnyPacket]) -> Iterator[AnyPacket]:
        """Hand packets on, each noted.

        Raises:
            InputError: If there is too much of them.
        """
        for packet in packets:
            self._progress()
            self._left_bytes -= packet.size
            if self._left_bytes < 0:
                raise InputError("corrupt", "the container's index names the same data many times")
            yield packet


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
def open_video(
    file: BinaryIO, limits: DecodeLimits, **options: str
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video, and choose its stream.

    Args:
        file: The video.
        limits: Bounds of its size.
        options: For FFmpeg's demuxer.

    Raises:
        InputError: If it cannot be opened, or holds no video that we decode.
    """
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
    # Pictures may grow in mid-stream.
    max_pixels = max(limits.max_pixels, _padded(context.width) * _padded(context.height))
    err_detect = "+crccheck" if context.name in _REFUSING_CODECS else _STRICT
    context.options = {"err_detect": err_detect, "max_pixels": str(max_pixels)}
    return stream


def _padded(side_px: int) -> int:
    """A side as FFmpeg counts it where it looks at its bound: of the buffer, not the picture."""
    return -(-side_px // _ALIGNMENT_PX) * _ALIGNMENT_PX


def needs_start(stream: VideoStream) -> bool:
    """Whether its frames can only be decoded from the video's beginning on.

    MOV and AVI hand a palette on with the packet behind it alone, and a seek leaves that out: what
    is decoded then is black, or has the colours of other frames.
    """
    context = stream.codec_context
    return context.pix_fmt == "pal8" and context.name not in _OWN_PALETTE_CODECS


def open_decoder(stream: VideoStream) -> None:
    """Open the decoder, as the first packet would.

    Raises:
        InputError: ``unsupported``, if it does not do this kind of video. What it calls damage is
            left to the frames.
    """
    try:
        stream.codec_context.open(strict=False)
    except (MemoryError, av.InvalidDataError):
        return
    except av.FFmpegError as error:
        message = f"the {stream.codec_context.name} decoder does not open: {reason_of(error)}"
        raise InputError("unsupported", message) from error


def decode_packet(packet: "Packet[VideoStream]") -> list[VideoFrame]:
    """The frames that come out, all of them whole as far as their decoder can tell.

    Raises:
        av.FFmpegError: If there is damage.
    """
    if packet.stream.codec_context.name not in _REFUSING_CODECS:
        return packet.decode()
    num_said = _num_said()
    frames = packet.decode()
    if _num_said() > num_said:
        raise av.InvalidDataError(EILSEQ, "damaged")
    return frames


def _num_said() -> int:
    """How many errors FFmpeg has printed; what it prints is kept by ``quiet_ffmpeg``."""
    return av.logging.get_last_error()[0]


def _unopenable(file: BinaryIO, error: av.FFmpegError) -> InputError:
    if lacks_index(file):
        return InputError("truncated", "the video ends before its index (no moov box)")
    file.seek(0)
    name = signatures.no_video(file.read(signatures.HEAD_BYTES))
    if name is not None:
        return InputError("unsupported", f"{name} under a video's name is not supported")
    return InputError("corrupt", f"the video cannot be opened: {reason_of(error)}")


def orientation_of(frame: VideoFrame) -> Orientation:
    """What its display matrix asks for."""
    matrix = cast("Mapping[SideDataType, SideData]", frame.side_data).get(
        SideDataType.DISPLAYMATRIX
    )
    return Orientation() if matrix is None else Orientation.from_display_matrix(bytes(matrix))


def reason_of(error: av.FFmpegError) -> str:
    """FFmpeg's own words."""
    return error.strerror or type(error).__name__
