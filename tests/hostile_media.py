"""Hostile files, made from real ones: seeded mutations of images, videos and tars.

Any mutant can be made again from its seed and its number alone.
"""

import io
import itertools
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from tests.media import encode_cv2, encode_image, picture, tar_of, write_video

Rng = np.random.Generator
Mutator = Callable[[bytes, Rng], bytes]

_INTERESTING = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 100_000)
_EXTREME = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x40000000)
_CONTAINERS = frozenset(
    (
        b"moov",
        b"trak",
        b"mdia",
        b"minf",
        b"stbl",
        b"edts",
        b"dinf",
        b"udta",
        b"moof",
        b"traf",
        b"mvex",
    )
)
_TS_PACKET = 188


@dataclass(frozen=True)
class Mutant:
    """A hostile file.

    Attributes:
        name: Its file name; the extension may be a lie.
        data: Its bytes.
        how: What was done to which file.
    """

    name: str
    data: bytes
    how: str


def make_corpus(folder: Path) -> dict[str, bytes]:
    """Whole files of every kind that the decoder knows, by name."""
    files = _images()
    for name, options in _VIDEOS.items():
        path = write_video(folder / name, **{"num_frames": 12, "gop": 4, **options})
        files[name] = path.read_bytes()
        path.unlink()
    return files | _tars(files)


def make_mutant(corpus: Mapping[str, bytes], seed: int, number: int) -> Mutant:
    """Mutant ``number`` of a seed; every fourth is of a video, every tenth of a tar."""
    rng = np.random.default_rng([seed, number])
    kind = "tar" if number % 10 == 8 else "video" if number % 4 == 3 else "image"
    names = sorted(name for name in corpus if _kind(name) == kind)
    source = names[rng.integers(len(names))]
    data, steps = mutated(corpus[source], rng)
    if rng.random() < 0.1:
        other = corpus[sorted(corpus)[rng.integers(len(corpus))]]
        data = _combined(data, other, rng)
        steps.append("combined")
    extension = source.rpartition(".")[2]
    if rng.random() < 0.05:
        extension = _EXTENSIONS[rng.integers(len(_EXTENSIONS))]
        steps.append(f"as .{extension}")
    return Mutant(f"m{number:06d}.{extension}", data, f"{source}: {', '.join(steps)}")


def mutated(data: bytes, rng: Rng) -> tuple[bytes, list[str]]:
    """Mutated once or a few times, and the names of what was done."""
    steps = []
    for _ in range(1 + rng.integers(3) * rng.integers(2)):
        choices = _GENERAL if rng.random() < 0.5 else (_mutators_for(data) or _GENERAL)
        mutate = choices[rng.integers(len(choices))]
        data = mutate(data, rng)
        steps.append(mutate.__name__)
    return data, steps


def _kind(name: str) -> str:
    return "tar" if name.endswith(".tar") else "video" if name in _VIDEOS else "image"


def _tars(files: Mapping[str, bytes]) -> dict[str, bytes]:
    long = f"{'folder/' * 20}rgb.png"
    chosen = ("exif.jpg", "rgb.png", "h264.mp4", "still.gif")
    members = [(name, files[name]) for name in chosen] + [(long, files["rgb.png"])]
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    return {f"{name}.tar": tar_of(members, format) for name, format in formats.items()}


def _images() -> dict[str, bytes]:
    rgb = picture()
    files = {
        "exif.jpg": encode_image(rgb, "JPEG", orientation=6),
        "grey.jpg": encode_image(rgb, "JPEG", mode="L"),
        "cmyk.jpg": encode_image(rgb, "JPEG", mode="CMYK"),
        "large.jpg": encode_cv2(picture(640, 480), ".jpg"),
        "rgb.png": encode_image(rgb, "PNG", orientation=3),
        "alpha.png": encode_image(rgb, "PNG", mode="RGBA"),
        "palette.png": encode_image(rgb, "PNG", mode="P"),
        "bit.png": encode_image(rgb, "PNG", mode="1"),
        "deep.png": _deep_png(),
        "lossy.webp": encode_image(rgb, "WEBP", orientation=8),
        "raw.tiff": encode_image(rgb, "TIFF"),
        "still.gif": encode_image(rgb, "GIF"),
        "plain.bmp": encode_image(rgb, "BMP"),
        "palette.bmp": encode_image(rgb, "BMP", mode="P"),
        "still.avif": encode_image(rgb, "AVIF"),
    }
    for extension in ("jp2", "hdr", "ppm", "pgm", "pbm", "pam", "ras"):
        files[f"cv2.{extension}"] = encode_cv2(rgb, f".{extension}")
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    for name, format, options in (
        ("moving.gif", "GIF", {"duration": 50}),
        ("moving.png", "PNG", {"duration": 50}),
        ("moving.webp", "WEBP", {"duration": 50, "lossless": True}),
        ("pages.tiff", "TIFF", {"compression": "tiff_lzw"}),
        ("jpeg.tiff", "TIFF", {"compression": "jpeg"}),
    ):
        files[name] = _saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    files["progressive.jpg"] = _saved(frames[0], "JPEG", progressive=True)
    return files


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _deep_png() -> bytes:
    deep = picture().astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    height, width = deep.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return _png([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


_VIDEOS: dict[str, dict[str, object]] = {
    "h264.mp4": {},
    "fast.mp4": {"container_options": {"movflags": "faststart"}},
    "pieces.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "sound.mp4": {"audio_s": 0.5},
    "turned.mov": {"rotation_deg": 90},
    "h264.mkv": {},
    "h264.ts": {},
    "h264.avi": {},
    "h265.mp4": {"codec": "libx265"},
    "h265.mkv": {"codec": "libx265"},
    "h265.ts": {"codec": "libx265"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
_EXTENSIONS = (
    "avif avi bmp gif hdr jp2 jpg mkv mov mp4 pam pbm pgm png ppm ras tar tiff ts webp".split()  # noqa: SIM905
)


def _flip(data: bytes, rng: Rng) -> bytes:
    """Change a few bytes anywhere."""
    changed = bytearray(data)
    for _ in range(1 + rng.integers(16)):
        if changed:
            changed[rng.integers(len(changed))] ^= 1 + rng.integers(255)
    return bytes(changed)


def _flip_head(data: bytes, rng: Rng) -> bytes:
    """Change a few bytes of the headers."""
    changed = bytearray(data)
    for _ in range(1 + rng.integers(8)):
        if changed:
            changed[rng.integers(min(256, len(changed)))] ^= 1 + rng.integers(255)
    return bytes(changed)


def _noise(data: bytes, rng: Rng) -> bytes:
    """Overwrite a run."""
    start, stop = _span(data, rng)
    return data[:start] + rng.bytes(stop - start) + data[stop:]


def _zeros(data: bytes, rng: Rng) -> bytes:
    """Zero a run, as a hole in a file."""
    start, stop = _span(data, rng)
    return data[:start] + bytes(stop - start) + data[stop:]


def _cut(data: bytes, rng: Rng) -> bytes:
    """Cut the end off."""
    return data[: rng.integers(len(data) + 1)]


def _empty(_data: bytes, _rng: Rng) -> bytes:
    """Nothing is left."""
    return b""


def _delete(data: bytes, rng: Rng) -> bytes:
    """Take a run out."""
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def _repeat(data: bytes, rng: Rng) -> bytes:
    """Put a run in twice, or often."""
    start, stop = _span(data, rng)
    return data[:start] + data[start:stop] * int(rng.choice((2, 2, 3, 50))) + data[stop:]


def _splice(data: bytes, rng: Rng) -> bytes:
    """Copy a run to another place."""
    start, stop = _span(data, rng)
    place = rng.integers(len(data) + 1)
    return data[:place] + data[start:stop] + data[place + stop - start :]


def _number(data: bytes, rng: Rng) -> bytes:
    """Set two, four or eight bytes to a number that readers trip over."""
    size = int(rng.choice((2, 4, 4, 8)))
    if len(data) < size:
        return data
    place = int(rng.integers(len(data) - size + 1))
    if rng.random() < 0.5:
        place = int(rng.integers(min(512, len(data) - size + 1)))
    order = "little" if rng.random() < 0.5 else "big"
    return data[:place] + _value(rng, size).to_bytes(size, order) + data[place + size :]


def _twice(data: bytes, _rng: Rng) -> bytes:
    """The file behind itself."""
    return data + data


def _combined(data: bytes, other: bytes, rng: Rng) -> bytes:
    """The head of one file and the tail of another, or all of both."""
    if rng.random() < 0.5:
        return data + other
    return data[: rng.integers(len(data) + 1)] + other[rng.integers(len(other) + 1) :]


_GENERAL: tuple[Mutator, ...] = (
    _flip,
    _flip,
    _flip_head,
    _flip_head,
    _noise,
    _zeros,
    _cut,
    _cut,
    _delete,
    _repeat,
    _splice,
    _number,
    _number,
    _twice,
    _empty,
)


def _span(data: bytes, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    longest = max(1, min(len(data) // 4, 4096))
    return start, min(len(data), start + 1 + int(rng.integers(longest)))


def _value(rng: Rng, size: int) -> int:
    choices = (*_INTERESTING, *_EXTREME, 2**63 - 1, 2**63, 2**64 - 1)
    return int(choices[rng.integers(len(choices))]) % (1 << 8 * size)


def _mutators_for(data: bytes) -> tuple[Mutator, ...]:
    """Those that know the format, by the file's first bytes."""
    is_of: dict[tuple[Mutator, ...], bool] = {
        (_png_length, _png_header, _png_order, _png_texts, _png_exif, _png_bomb): (
            data.startswith(b"\x89PNG")
        ),
        (_jpeg_length, _jpeg_size, _jpeg_segments, _jpeg_exif): data.startswith(b"\xff\xd8"),
        (_box_size, _box_number, _box_number, _box_order): data[4:8] == b"ftyp",
        (_ts_packets,): data[:1] == b"\x47" and len(data) % _TS_PACKET == 0,
        (_tiff_entry,): data[:4] in (b"II*\0", b"MM\0*"),
        (_tar_field, _tar_field, _tar_blocks): data[257:262] == b"ustar",
    }
    return next((mutators for mutators, fits in is_of.items() if fits), ())


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    pieces = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def _png_length(data: bytes, rng: Rng) -> bytes:
    """A chunk lies about its length."""
    places, place = [], 8
    while place + 12 <= len(data):
        places.append(place)
        place += 12 + struct.unpack_from(">I", data, place)[0]
    if not places:
        return data
    place = places[rng.integers(len(places))]
    return data[:place] + struct.pack(">I", _value(rng, 4)) + data[place + 4 :]


def _png_header(data: bytes, rng: Rng) -> bytes:
    """A header with a right checksum and a wrong size, depth or colour type."""
    chunks = _png_chunks(data)
    if not chunks or len(chunks[0][1]) < 13:
        return data
    header = bytearray(chunks[0][1])
    place = int(rng.choice((0, 4, 8, 9, 12)))
    if place < 8:
        header[place : place + 4] = struct.pack(">I", _value(rng, 4))
    else:
        header[place] = int(rng.integers(256))
    return _png([(b"IHDR", bytes(header)), *chunks[1:]])


def _png_order(data: bytes, rng: Rng) -> bytes:
    """Chunks in another order, twice, or not at all."""
    chunks = _png_chunks(data)
    if not chunks:
        return data
    place = rng.integers(len(chunks))
    chunk = chunks[place]
    if rng.random() < 0.3:
        del chunks[place]
    else:
        chunks.insert(int(rng.integers(len(chunks) + 1)), chunk)
    return _png(chunks)


def _png_texts(data: bytes, rng: Rng) -> bytes:
    """Megabytes of text, or of a colour profile, from kilobytes."""
    packed = _packed_zeros(int(rng.choice((1 << 10, 1 << 20, 1 << 24))))
    name, head = ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"))[
        rng.integers(3)
    ]
    chunks = _png_chunks(data)
    return _png([*chunks[:1], *[(name, head + packed)] * int(rng.integers(1, 20)), *chunks[1:]])


def _png_exif(data: bytes, rng: Rng) -> bytes:
    """An EXIF block that leads nowhere or round in circles."""
    chunks = _png_chunks(data)
    return _png([*chunks[:1], (b"eXIf", _exif_bomb(rng)), *chunks[1:]])


def _png_bomb(data: bytes, rng: Rng) -> bytes:
    """A few kilobytes that are a picture of many megapixels, mostly above or near the caps."""
    if rng.random() < 0.8:
        return _png_header(data, rng)
    width, height = int(rng.choice((3000, 9000, 40_000))), int(rng.choice((3000, 9000)))
    rows = _packed_zeros(((width + 7) // 8 + 1) * height)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return _png([(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")])


@lru_cache
def _packed_zeros(length: int) -> bytes:
    return zlib.compress(bytes(length), 9)


def _exif_bomb(rng: Rng) -> bytes:
    entries = []
    for _ in range(1 + rng.integers(6)):
        tag = int(rng.choice((0x0112, 0x8769, 0x8825, 0x9003, 0x9011, 2, 4, 7, 29, 0x010E)))
        kind, count = int(rng.integers(14)), _value(rng, 4)
        value = int(rng.choice((8, 0, _value(rng, 4))))
        entries.append(struct.pack("<HHII", tag, kind, count, value))
    following = struct.pack("<I", int(rng.choice((0, 8))))
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + following
    ) + rng.bytes(64)


def _jpeg_places(data: bytes) -> list[int]:
    places, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        places.append(place)
        if data[place + 1] == 0xDA:
            break
        place += 2 + struct.unpack_from(">H", data, place + 2)[0]
    return places


def _jpeg_length(data: bytes, rng: Rng) -> bytes:
    """A segment lies about its length."""
    places = _jpeg_places(data)
    if not places:
        return data
    place = places[rng.integers(len(places))] + 2
    return data[:place] + struct.pack(">H", _value(rng, 2)) + data[place + 2 :]


def _jpeg_size(data: bytes, rng: Rng) -> bytes:
    """A frame header with another size, precision or sampling."""
    for place in _jpeg_places(data):
        if data[place + 1] in (0xC0, 0xC1, 0xC2) and place + 19 < len(data):
            at = place + int(rng.choice((5, 7)))
            if rng.random() < 0.7:
                return data[:at] + struct.pack(">H", _value(rng, 2)) + data[at + 2 :]
            at = place + int(rng.choice((4, 9, 11, 12)))
            return data[:at] + rng.bytes(1) + data[at + 1 :]
    return data


def _jpeg_segments(data: bytes, rng: Rng) -> bytes:
    """A segment is lost, comes twice, or is noise."""
    places = _jpeg_places(data)
    if len(places) < 2:
        return data
    which = rng.integers(len(places) - 1)
    start, stop = places[which], places[which + 1]
    middle = (b"", data[start:stop] * 2, data[start : start + 4] + rng.bytes(stop - start - 4))
    return data[:start] + middle[rng.integers(3)] + data[stop:]


def _jpeg_exif(data: bytes, rng: Rng) -> bytes:
    """An EXIF block that leads nowhere or round in circles."""
    body = b"Exif\0\0" + _exif_bomb(rng)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """``(name, place, size)`` of boxes, also of those inside of others."""
    while start + 8 <= stop:
        size, name = struct.unpack_from(">I4s", data, start)
        if size < 8 or start + size > stop:
            return
        yield name, start, size
        if name in _CONTAINERS:
            yield from _boxes(data, start + 8, start + size)
        start += size


def _box(data: bytes, rng: Rng) -> tuple[bytes, int, int] | None:
    # The pixels' own box is one of many: indexes are what readers trust.
    boxes = list(_boxes(data, 0, len(data)))
    return boxes[rng.integers(len(boxes))] if boxes else None


def _box_size(data: bytes, rng: Rng) -> bytes:
    """A box lies about its size."""
    box = _box(data, rng)
    if box is None:
        return data
    place = box[1]
    size = _value(rng, 4) if rng.random() < 0.7 else max(0, box[2] + int(rng.integers(-16, 17)))
    return data[:place] + struct.pack(">I", size) + data[place + 4 :]


def _box_number(data: bytes, rng: Rng) -> bytes:
    """A number in a box is another: of sizes, times, offsets, counts, edits."""
    leaves = [item for item in _boxes(data, 0, len(data)) if item[0] not in _CONTAINERS]
    leaves = [item for item in leaves if item[2] >= 16 and item[0] != b"mdat"]
    if not leaves:
        return data
    _, place, size = leaves[rng.integers(len(leaves))]
    at = place + 8 + 4 * int(rng.integers((size - 8) // 4))
    return data[:at] + struct.pack(">I", _value(rng, 4)) + data[at + 4 :]


def _box_order(data: bytes, rng: Rng) -> bytes:
    """A box is lost, comes twice, or has another name."""
    box = _box(data, rng)
    if box is None:
        return data
    _, start, size = box
    stop = start + size
    choice = rng.integers(3)
    if choice == 0:
        return data[:start] + data[stop:]
    if choice == 1:
        return data[:stop] + data[start:stop] + data[stop:]
    return data[: start + 4] + rng.bytes(4) + data[start + 8 :]


def _ts_packets(data: bytes, rng: Rng) -> bytes:
    """Packets are lost, come twice, or in another order."""
    packets = [data[at : at + _TS_PACKET] for at in range(0, len(data), _TS_PACKET)]
    order = list(range(len(packets)))
    for _ in range(1 + rng.integers(5)):
        place = int(rng.integers(len(order)))
        choice = rng.integers(3)
        if choice == 0 and len(order) > 1:
            del order[place]
        elif choice == 1:
            order.insert(place, order[int(rng.integers(len(order)))])
        else:
            other = int(rng.integers(len(order)))
            order[place], order[other] = order[other], order[place]
    return b"".join(packets[place] for place in order)


def _tar_headers(data: bytes) -> list[int]:
    return [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]


def _tar_field(data: bytes, rng: Rng) -> bytes:
    """A header with a right checksum and another name, size, type, link or record."""
    headers = _tar_headers(data)
    if not headers:
        return data
    at = headers[rng.integers(len(headers))]
    block = bytearray(data[at : at + 512])
    start, length = ((0, 100), (124, 12), (124, 12), (156, 1), (157, 100), (345, 155))[
        rng.integers(6)
    ]
    block[start : start + length] = _tar_value(rng, length)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


def _tar_value(rng: Rng, length: int) -> bytes:
    if length == 1:
        return b"0123456789LKxgSDMNV\0"[(at := rng.integers(20)) : at + 1]
    if length == 12:
        number = int(rng.choice((0, 1, 511, 512, 513, 8**11 - 1, int(rng.integers(1 << 20)))))
        base_256 = b"\x80" + rng.bytes(11), b"\xff" * 12, b"\xff" + rng.bytes(11)
        return (b"%011o\0" % number, *base_256, b"-0000000001\0")[rng.integers(5)]
    names = (
        b"../up.png",
        b"/root.png",
        b"a//b.png",
        b"\xff\xfe.png",
        b"a\nb.png",
        b"rgb.png",
        b"...",
    )
    return names[rng.integers(len(names))].ljust(length, b"\0")


def _tar_blocks(data: bytes, rng: Rng) -> bytes:
    """Members are lost, come twice, or in another order."""
    places = [*_tar_headers(data), len(data)]
    pieces = [data[start:stop] for start, stop in itertools.pairwise(places)]
    if not pieces:
        return data
    pieces.insert(int(rng.integers(len(pieces) + 1)), pieces.pop(int(rng.integers(len(pieces)))))
    if rng.random() < 0.5:
        pieces.append(pieces[int(rng.integers(len(pieces)))])
    return b"".join(pieces)


def _tiff_entry(data: bytes, rng: Rng) -> bytes:
    """An entry of the first directory has another tag, type, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", data.ljust(8, b"\0"), 4)
    if directory + 2 > len(data):
        return data
    (entries,) = struct.unpack_from(f"{order}H", data, directory)
    at = directory + 2 + 12 * int(rng.integers(max(1, entries))) + int(rng.choice((2, 4, 8)))
    if at + 4 > len(data):
        return data
    return data[:at] + struct.pack(f"{order}I", _value(rng, 4)) + data[at + 4 :]
