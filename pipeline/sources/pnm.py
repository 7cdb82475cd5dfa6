"""The PNM family, which OpenCV gets wrong: PBM, PGM and PPM, plain or not, and PAM."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import UInt8Array
from pipeline.sources.assets import nearest_of_8_bits

_START = re.compile(rb"P[1-7]\s")
_FLOATING = re.compile(rb"P[FfHh]\s")
_NUMBER = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*(\d{1,9})(?=\s|#)")
_COMMENT = re.compile(rb"#[^\r\n]*")
_MAX_HEADER_BYTES = 64 * 1024
_PAM = 7
_TUPLES = frozenset(
    {b"", b"BLACKANDWHITE", b"GRAYSCALE", b"RGB"}
    | {b"BLACKANDWHITE_ALPHA", b"GRAYSCALE_ALPHA", b"RGB_ALPHA"}
)


@dataclass(frozen=True, kw_only=True)
class PnmHeader:
    """What stands in front of the samples.

    Attributes:
        kind: The digit behind the P.
        width: Width in pixels.
        height: Height in pixels.
        depth: Samples per pixel, alpha included.
        max_value: The sample that is full intensity.
        offset: Where the samples begin.
        tuple_type: What PAM calls a pixel.
    """

    kind: int
    width: int
    height: int
    depth: int
    max_value: int
    offset: int
    tuple_type: bytes = b""

    @property
    def num_samples(self) -> int:
        """Samples of the whole image."""
        return self.width * self.height * self.depth


def is_pnm(data: bytes) -> bool:
    """Whether a file begins as one of the family, the floating ones included."""
    return _START.match(data) is not None or _FLOATING.match(data) is not None


def read_header(data: bytes) -> PnmHeader | None:
    """The header; None if there is none that makes sense."""
    if _START.match(data) is None:
        return None
    kind = data[1] - ord("0")
    header = _read_pam_header(data) if kind == _PAM else _read_plain_header(data, kind)
    if header is None or not (0 < header.max_value < 65536 and header.num_samples > 0):
        return None
    return header


def decode(data: bytes) -> UInt8Array:
    """RGB pixels: samples scaled to 8 bits, grey copied, alpha dropped.

    Raises:
        InputError: ``truncated``, ``corrupt`` or ``unsupported``.
        MemoryError: If there is too little.
    """
    if _FLOATING.match(data):
        raise InputError("unsupported", "a PNM of floating numbers is not supported")
    header = read_header(data)
    if header is None:
        raise InputError("corrupt", "the header of the PNM image cannot be read")
    if header.depth > 4 or header.tuple_type not in _TUPLES:
        raise InputError("unsupported", "a PAM of other tuples than grey and RGB is not supported")
    samples = _read_samples(data, header).reshape(header.height, header.width, header.depth)
    colours = samples[..., :3] if header.depth > 2 else samples[..., :1]
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    if header.max_value == 255 and colours.dtype == np.uint8:
        pixels[...] = colours
        return pixels
    scale = _scale(header.max_value)
    for row, values in zip(pixels, colours, strict=True):
        row[...] = scale[values]
    return pixels


def _read_plain_header(data: bytes, kind: int) -> PnmHeader | None:
    numbers: list[int] = []
    position = 2
    while len(numbers) < (2 if kind in (1, 4) else 3):
        found = _NUMBER.match(data, position, position + _MAX_HEADER_BYTES)
        if found is None:
            return None
        numbers.append(int(found[1]))
        position = found.end()
    return PnmHeader(
        kind=kind,
        width=numbers[0],
        height=numbers[1],
        depth=3 if kind in (3, 6) else 1,
        max_value=numbers[2] if len(numbers) > 2 else 1,
        offset=position + 1,
    )


def _read_pam_header(data: bytes) -> PnmHeader | None:
    end = data.find(b"\nENDHDR", 0, _MAX_HEADER_BYTES)
    offset = data.find(b"\n", end + 1) + 1
    if end < 0 or offset == 0:
        return None
    fields = {b"TUPLTYPE": b""}
    for line in data[3:end].splitlines():
        name, _, value = line.strip().partition(b" ")
        fields[name] = value.strip()
    numbers = [fields.get(name, b"") for name in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL")]
    if not all(number.isdigit() and len(number) < 10 for number in numbers):
        return None
    width, height, depth, max_value = map(int, numbers)
    return PnmHeader(
        kind=_PAM,
        width=width,
        height=height,
        depth=depth,
        max_value=max_value,
        offset=offset,
        tuple_type=fields[b"TUPLTYPE"],
    )


def _read_samples(data: bytes, header: PnmHeader) -> NDArray[np.integer]:
    if header.kind in (1, 2, 3):
        return _read_text(data, header)
    if header.kind == 4:
        raster = _read_bytes(data, header, header.height * -(-header.width // 8))
        rows = raster.reshape(header.height, -1)
        return 1 - np.unpackbits(rows, axis=1, count=header.width)
    if header.max_value < 256:
        return _read_bytes(data, header, header.num_samples)
    return _read_bytes(data, header, 2 * header.num_samples).view(">u2")


def _read_bytes(data: bytes, header: PnmHeader, num_bytes: int) -> UInt8Array:
    if header.offset + num_bytes > len(data):
        raise _truncated()
    return np.frombuffer(data, np.uint8, num_bytes, header.offset)


def _read_text(data: bytes, header: PnmHeader) -> NDArray[np.integer]:
    text = data[header.offset :]
    if b"#" in text:
        text = _COMMENT.sub(b"", text)
    if header.kind == 1:
        # Nothing need stand between the digits.
        digits = np.frombuffer(text.translate(None, b" \t\r\n\v\f"), np.uint8)
        samples = np.asarray(ord("1") - digits.astype(np.int16))
    else:
        try:
            samples = np.fromstring(text, np.int64, sep=" ") if text.strip() else np.empty(0, int)
        except ValueError:
            raise InputError("corrupt", "the PNM image's samples are no numbers") from None
    if len(samples) < header.num_samples:
        raise _truncated()
    samples = samples[: header.num_samples]
    if samples.min() < 0 or samples.max() > header.max_value:
        raise InputError("corrupt", "the PNM image's samples are beyond its largest value")
    return samples


def _scale(max_value: int) -> UInt8Array:
    """The 8 bits of each sample: the nearest of fewer bits, the high ones of more."""
    if max_value < 256:
        return nearest_of_8_bits(max_value)
    high = np.arange(65536) * 256 // (max_value + 1)
    return np.minimum(high, 255).astype(np.uint8)


def _truncated() -> InputError:
    return InputError("truncated", "the image file ends early")
