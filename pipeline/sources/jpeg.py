"""A JPEG around its pixels: whether all of them are there, and what libjpeg says of them.

Libjpeg fills what it cannot decode with grey, says so on stderr only, and prints only the first of
its warnings. So harmless oddities, of which it would warn, are mended before it decodes, and scans
that are missing altogether, of which it says nothing, are looked for here.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.errors import InputError

START = b"\xff\xd8"

_END = b"\xff\xd9"
# Not stuffed bytes, fill bytes, restarts, nor TEM: none of them starts a segment.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
_APP0, _APP14 = 0xE0, 0xEE
_SCAN = 0xDA
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_LOSSLESS = 0xC3
_JPEG_LS = 0xF7
_FRAMES = frozenset({*range(0xC0, 0xD0), _JPEG_LS}) - {0xC4, 0xC8, 0xCC}
_WHOLE_BLOCK = (0, 63, 0)
_NUM_COEFFICIENTS = 64

_DAMAGE = re.compile(
    rb"Corrupt JPEG data: (?:(\d+) extraneous bytes before marker 0xd9)?"
    rb"|Inconsistent progression sequence|Premature end of JPEG"
)
# Some cameras pad the last scan; damage leaves far more than that unread.
_HARMLESS_EXTRANEOUS_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class JpegStructure:
    """What the segments of a JPEG say.

    Attributes:
        is_whole: Whether an end marker stands behind scans that hold all of every channel.
        unsupported: Why no decoder here can read it, whatever its pixels; None if one may.
        may_be_unsupported: Whether a failure to decode it is more likely ours than the file's.
        oddities: Places and proper values of harmless bytes of which libjpeg would complain.
    """

    is_whole: bool
    unsupported: str | None = None
    may_be_unsupported: bool = False
    oddities: tuple[tuple[int, int], ...] = ()

    def mend(self, data: bytes) -> bytes:
        """The file without its oddities."""
        if not self.oddities:
            return data
        mended = bytearray(data)
        for place, value in self.oddities:
            mended[place] = value
        return bytes(mended)


def read_structure(data: bytes) -> JpegStructure:
    """Look through the segments of a JPEG, up to the scan that completes it."""
    frame: _Frame | None = None
    is_whole = False
    oddities: list[tuple[int, int]] = []
    transforms: list[int] = []
    for marker, start, stop in _segments(data):
        if marker == _END[1]:
            # Without a frame this is no image: for libjpeg to say.
            is_whole = frame is None
            break
        if marker == _APP0 and stop - start >= 14 and data.startswith(b"JFIF\0", start):
            oddities += [(start + 5, 1)] if data[start + 5] != 1 else []
        elif marker == _APP14 and stop - start >= 12 and data.startswith(b"Adobe", start):
            transforms.append(start + 11)
        elif marker in _FRAMES:
            frame = _read_frame(marker, data[start:stop])
            if frame is None or frame.unsupported is not None:
                reason = None if frame is None else frame.unsupported
                return JpegStructure(is_whole=True, unsupported=reason)
        elif marker == _SCAN and frame is not None:
            oddities += frame.add_scan(data, start, stop)
            if frame.is_complete:
                is_whole = data.rfind(_END, stop) != -1
                break
    if frame is None:
        return JpegStructure(is_whole=is_whole)
    return JpegStructure(
        is_whole=is_whole,
        may_be_unsupported=frame.marker not in (0xC0, 0xC1, 0xC2),
        oddities=(*oddities, *frame.odd_transforms(data, transforms)),
    )


def check_said(said: bytes) -> None:
    """Refuse pixels that libjpeg has made up.

    Args:
        said: What it has printed about a file that has no oddities.

    Raises:
        InputError: ``corrupt``.
    """
    damage = _DAMAGE.search(said)
    if damage is None:
        return
    if damage[1] is None or int(damage[1]) > _HARMLESS_EXTRANEOUS_BYTES:
        raise InputError("corrupt", "the JPEG's compressed data is damaged")


class _Frame:
    """The frame header, and which bits of its channels' coefficients its scans have brought."""

    def __init__(self, marker: int, unsupported: str | None, ids: bytes) -> None:
        self.marker = marker
        self.unsupported = unsupported
        self._ids = ids
        # By channel and coefficient, the number of low bits that are still to come.
        self._missing_bits = [bytearray(b"\xff" * _NUM_COEFFICIENTS) for _ in ids]

    @property
    def is_complete(self) -> bool:
        return not any(map(any, self._missing_bits))

    def add_scan(self, data: bytes, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """Note what a scan brings; places and proper values of its odd parameters."""
        parameters = start + 1 + 2 * data[start] if start < stop else stop
        if parameters + 3 > stop:
            return ()
        first, last, bits = data[parameters : parameters + 3]
        is_odd = self.marker in _SEQUENTIAL and (first, last, bits) != _WHOLE_BLOCK
        if self.marker not in _PROGRESSIVE:
            first, last, bits = _WHOLE_BLOCK
        last = min(last, _NUM_COEFFICIENTS - 1)
        brought = bytes([bits & 0x0F]) * max(0, last + 1 - first)
        for channel in self._channels(data[start + 1 : parameters : 2]):
            self._missing_bits[channel][first : first + len(brought)] = brought
        places = range(parameters, parameters + 3) if is_odd else ()
        return tuple(zip(places, _WHOLE_BLOCK, strict=False))

    def odd_transforms(self, data: bytes, places: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Adobe's colour transforms that libjpeg does not know, and what it takes them for."""
        assumed = {3: 1, 4: 2}.get(len(self._ids), 0)
        for place in places:
            if assumed and data[place] not in (0, assumed):
                yield place, assumed

    def _channels(self, ids: bytes) -> Iterator[int]:
        taken: set[int] = set()
        for wanted in ids:
            for channel, name in enumerate(self._ids):
                # Some files give all channels the same name.
                if name == wanted and channel not in taken:
                    taken.add(channel)
                    yield channel
                    break


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Markers with the bounds of what belongs to them; ends early where the file does."""
    position = len(START)
    while (found := _MARKER.search(data, position)) is not None:
        place = found.start()
        marker = data[place + 1]
        position = place + 2
        if marker in (START[1], _END[1]):
            yield marker, position, position
            continue
        if position + 2 > len(data):
            return
        (length,) = struct.unpack_from(">H", data, position)
        start, position = position + 2, position + max(2, length)
        if position > len(data):
            return
        yield marker, start, position


def _read_frame(marker: int, header: bytes) -> _Frame | None:
    if len(header) < 6 or len(header) != 6 + 3 * header[5]:
        return None
    precision, height, _, num_channels = struct.unpack_from(">BHHB", header)
    unsupported = None
    if marker == _JPEG_LS:
        unsupported = "JPEG-LS is not supported"
    elif marker not in _SEQUENTIAL | _PROGRESSIVE | {_LOSSLESS}:
        unsupported = "hierarchical and lossless arithmetic JPEGs are not supported"
    elif precision != 8:
        unsupported = f"a JPEG of {precision} bits per channel is not supported"
    elif height == 0:
        unsupported = "a JPEG that tells its height after its pixels is not supported"
    elif num_channels not in (1, 3, 4):
        unsupported = f"a JPEG of {num_channels} channels is not supported"
    return _Frame(marker, unsupported, header[6::3])
