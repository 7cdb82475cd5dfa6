"""The decoding child: ``python -m pipeline.decode_child CHANNEL MEMORY_BYTES``.

Takes requests from its parent and answers with events; pixels go into the shared memory file that
came with the request. It ends at once, whatever it is doing, when the parent is gone; an alarm ends
it where not even that works. Only ``pipeline.decode_process`` starts it.
"""

import os
import resource
import signal
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from io import SEEK_END
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

import cv2

from pipeline.decode_messages import (
    DecodeItem,
    DecodeRequest,
    Event,
    ProbeRequest,
    Request,
    receive_request,
    send_event,
)
from pipeline.errors import (
    CredentialsError,
    ErrorKind,
    InputError,
    ObjectForbiddenError,
    ObjectNotFoundError,
    StorageError,
    UserError,
)
from pipeline.geometry import UInt8Array, resize
from pipeline.pixel_memory import SeenMemory
from pipeline.records import Asset, AssetKind, Slice
from pipeline.sources.assets import AssetProbe, DecodeLimits, check_pixels
from pipeline.sources.images import HEAD_BYTES, decode_image, read_header
from pipeline.sources.tar import probe_tar
from pipeline.storage import Store, open_store, open_window, unescape_path

_PREFETCH_THREADS = 8
_PREFETCH_BYTES = 128 << 20
# The parent's deadline comes first; the alarm is for a parent that is stopped.
_ALARM_FACTOR = 2.0
_ALARM_EXTRA_S = 10.0

Emit = Callable[[Event], None]


def main() -> None:
    """Serve requests until the parent is gone."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    _confine(memory_bytes=int(sys.argv[2]))
    requests: SimpleQueue[tuple[Request, int | None]] = SimpleQueue()
    memory = SeenMemory()
    Thread(target=_listen, args=(channel, requests), daemon=True).start()
    send_event(channel, ["ready"])
    while True:
        request, fd = requests.get()  # nosec B113
        pulse = _Pulse(channel, request.limits.deadline_s)
        try:
            if isinstance(request, ProbeRequest):
                _probe(request, pulse)
            elif fd is not None:
                decode_items(request, _pixels(memory.array(fd), request.size), pulse)
        except (UserError, CredentialsError) as error:
            pulse.emit(["refused", str(error)])
        pulse.rest()
        send_event(channel, ["done"])


def _confine(memory_bytes: int) -> None:
    # Sent to a whole group, they are meant for who leads it, whose end is ours. A death of them
    # would be laid to an input.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, ceiling = resource.getrlimit(resource.RLIMIT_DATA)
    if ceiling != resource.RLIM_INFINITY:
        memory_bytes = min(memory_bytes, ceiling)
    # Not RLIMIT_AS, which would count what allocators and thread pools reserve but never touch.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    cv2.setNumThreads(1)


def _listen(channel: socket.socket, requests: SimpleQueue[tuple[Request, int | None]]) -> None:
    while True:
        try:
            requests.put(receive_request(channel))  # nosec B113
        except (EOFError, OSError):
            os._exit(0)


class _Pulse:
    """Events to the parent, and signs of life between them, which put off both deadlines."""

    def __init__(self, channel: socket.socket, deadline_s: float) -> None:
        self._channel = channel
        self._alarm_s = deadline_s * _ALARM_FACTOR + _ALARM_EXTRA_S
        self._interval_s = min(1.0, deadline_s / 4)
        self._last_s = 0.0

    def emit(self, event: Event) -> None:
        """Tell the parent."""
        signal.setitimer(signal.ITIMER_REAL, self._alarm_s)
        self._last_s = time.monotonic()
        send_event(self._channel, event)

    def beat(self) -> None:
        """There is progress."""
        if time.monotonic() - self._last_s >= self._interval_s:
            self.emit(["alive"])

    def rest(self) -> None:
        """Nothing is being done."""
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Prefetch:
    """Loads what comes next while the present is decoded, within bounds."""

    def __init__(self, load: Callable[[int], bytes], sizes: Sequence[int]) -> None:
        self._load = load
        self._sizes = sizes
        self._pending: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._next = 0
        self._pool = ThreadPoolExecutor(_PREFETCH_THREADS)

    def get(self, index: int) -> bytes:
        """The bytes of one entry; entries must be asked for in rising order."""
        self._next = max(self._next, index)
        while self._next < len(self._sizes) and self._has_room():
            self._pending[self._next] = self._pool.submit(self._load, self._next)
            self._next += 1
        return self._pending.pop(index).result()

    def close(self) -> None:
        """Forget what nobody asked for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _has_room(self) -> bool:
        if not self._pending:
            return True
        waiting_bytes = sum(self._sizes[index] for index in self._pending)
        return (
            len(self._pending) < _PREFETCH_THREADS
            and waiting_bytes + self._sizes[self._next] <= _PREFETCH_BYTES
        )


def _prepare(kinds: set[AssetKind], pulse: _Pulse) -> None:
    """Import what only some inputs need, before any of them is begun.

    If there is too little memory left for that, the child dies of none of them, and a fresh one has
    enough.
    """
    if "video" in kinds:
        _import_ffmpeg()
        pulse.emit(["alive"])


@cache
def _import_ffmpeg() -> None:
    from pipeline.sources import video, video_file, video_frames  # noqa: F401 - used further down

    # Kept at errors, which then come with exceptions, but printed nowhere.
    video_file.quiet_ffmpeg()


def decode_items(request: DecodeRequest, pixels: UInt8Array, pulse: _Pulse) -> None:
    """Decode a request's frames into ``pixels`` ``(slots, h, w, 3)`` and tell of each."""
    _prepare({item.part.kind for item in request.items}, pulse)
    store = open_store(request.root, request.storage)
    images = [item.part for item in request.items if item.part.kind == "image"]
    files = _Prefetch(
        lambda index: _fetch_image(store, images[index], request.limits),
        [part.size_bytes for part in images],
    )
    num_images = 0
    for index, item in enumerate(request.items):
        pulse.emit(["begin", index])
        if item.part.kind == "image":
            outcomes = _read_image(item, files, num_images, request)
            num_images += 1
        else:
            outcomes = _read_video(item, store, request.limits, pulse)
        _deliver(item, outcomes, pixels, request, pulse)
    files.close()


def _pixels(memory: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """As many slots as there is room for."""
    width, height = size
    num_bytes = width * height * 3
    return memory[: len(memory) // num_bytes * num_bytes].reshape(-1, height, width, 3)


Outcome = tuple[int, UInt8Array | None, ErrorKind | None, str | None]


def _deliver(
    item: DecodeItem,
    outcomes: Iterator[Outcome],
    pixels: UInt8Array,
    request: DecodeRequest,
    pulse: _Pulse,
) -> None:
    left = dict.fromkeys(item.slots)
    try:
        for slot, frame, kind, message in outcomes:
            if frame is None:
                pulse.emit(["error", slot, kind, message])
            else:
                resize(frame, request.size, out=pixels[slot])
                pulse.emit(["frame", slot])
            del left[slot]
    except CredentialsError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever an input does to a decoder is its error
        kind, message = _typed(error)
        for slot in left:
            pulse.emit(["error", slot, kind, message])


def _read_image(
    item: DecodeItem, files: _Prefetch, index: int, request: DecodeRequest
) -> Iterator[Outcome]:
    frame, size = decode_image(files.get(index), request.limits, request.size)
    _check_size(item.part, size)
    yield item.slots[0], frame, None, None


def _fetch_image(store: Store, part: Slice, limits: DecodeLimits) -> bytes:
    _check_file_size(part.size_bytes, limits)
    data, etag = _read(store, part)
    _check_unchanged(part, len(data), etag)
    return data


def _read(store: Store, where: Asset | Slice) -> tuple[bytes, str]:
    """All bytes of an asset, and the fingerprint of the file that holds it."""
    key = unescape_path(where.file)
    if where.container is None:
        return store.read_with_fingerprint(key)
    if not where.size_bytes:
        return b"", store.fingerprint(key)
    return store.read_range_with_fingerprint(key, where.offset, where.size_bytes)


def _open(store: Store, where: Asset | Slice) -> BinaryIO:
    file = store.open_seekable(unescape_path(where.file))
    return file if where.container is None else open_window(file, where.offset, where.size_bytes)


def _read_video(
    item: DecodeItem, store: Store, limits: DecodeLimits, pulse: _Pulse
) -> Iterator[Outcome]:
    from pipeline.sources.video_frames import read_frames

    part = item.part
    with _open(store, part) as file:
        _check_unchanged(part, file.seek(0, SEEK_END), store.fingerprint(unescape_path(part.file)))
        size = part.width, part.height
        wanted, seek_pts, ranks = part.pts, part.seek_pts, part.frame_index
        for outcome in read_frames(file, wanted, seek_pts, size, limits, pulse.beat, ranks=ranks):
            slot = item.slots[outcome.position]
            yield slot, outcome.pixels, outcome.error_kind, outcome.error


def _check_file_size(size_bytes: int, limits: DecodeLimits) -> None:
    if size_bytes > limits.max_file_bytes:
        message = f"the file has {size_bytes} bytes, more than {limits.max_file_bytes}"
        raise InputError("too_large", message)


def _check_unchanged(part: Slice, size_bytes: int, etag: str) -> None:
    if size_bytes != part.size_bytes:
        message = f"the file changed since planning: {part.size_bytes} bytes then, {size_bytes} now"
        raise InputError("fetch", message)
    # A file that could not be read while it was listed has no ETag.
    if part.etag and etag != part.etag:
        raise InputError("fetch", "the file has changed since it was planned")


def _check_size(part: Slice, size: tuple[int, int]) -> None:
    if size != (part.width, part.height):
        message = f"the image is {size[0]}x{size[1]}, the plan says {part.width}x{part.height}"
        raise InputError("corrupt", message)


def _probe(request: ProbeRequest, pulse: _Pulse) -> None:
    _prepare({asset.kind for asset in request.assets}, pulse)
    store = open_store(request.root, request.storage)
    images = [asset for asset in request.assets if asset.kind == "image"]
    heads = _Prefetch(
        lambda index: _fetch_head(store, images[index], request.limits),
        [min(HEAD_BYTES, asset.size_bytes) for asset in images],
    )
    num_images = 0
    for index, asset in enumerate(request.assets):
        pulse.emit(["begin", index])
        if asset.kind == "image":
            probe = partial(_probe_image, store, asset, heads, num_images, request.limits)
            num_images += 1
        elif asset.kind == "video":
            probe = partial(_probe_video, store, asset, request.limits, pulse)
        else:
            probe = partial(_probe_tar, store, asset, pulse)
        try:
            pulse.emit(["probe", index, _fields(probe())])
        except CredentialsError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an input does to a decoder is its error
            pulse.emit(["error", index, *_typed(error)])
    heads.close()


def _fetch_head(store: Store, asset: Asset, limits: DecodeLimits) -> bytes:
    _check_file_size(asset.size_bytes, limits)
    length = min(HEAD_BYTES, asset.size_bytes) if asset.container else HEAD_BYTES
    return store.read_range(unescape_path(asset.file), asset.offset, length)


def _probe_image(
    store: Store, asset: Asset, heads: _Prefetch, index: int, limits: DecodeLimits
) -> AssetProbe:
    data = heads.get(index)
    header = read_header(data)
    if header is None:
        if len(data) < asset.size_bytes:
            data, _ = _read(store, asset)
            header = read_header(data)
        if header is None:
            _, (width, height) = decode_image(data, limits)
            return AssetProbe(asset=asset, width=width, height=height)
    check_pixels(header.width, header.height, limits)
    return AssetProbe(
        asset=asset,
        width=header.width,
        height=header.height,
        rotation_deg=header.orientation.rotation_deg,
        capture=header.capture,
    )


def _probe_video(store: Store, asset: Asset, limits: DecodeLimits, pulse: _Pulse) -> AssetProbe:
    from pipeline.sources.video import probe_video

    with _open(store, asset) as file:
        return probe_video(file, asset, limits, pulse.beat)


def _probe_tar(store: Store, asset: Asset, pulse: _Pulse) -> AssetProbe:
    with _open(store, asset) as file:
        return probe_tar(file, asset, pulse.beat)


def _fields(probe: AssetProbe) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(probe).items() if name != "asset"}
    return fields | {"time_base": str(probe.time_base)}


def _typed(error: Exception) -> tuple[ErrorKind, str]:
    if isinstance(error, InputError):
        return error.kind, error.message
    is_cv2_memory = isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem
    if isinstance(error, MemoryError) or is_cv2_memory:
        return "out_of_memory", "decoding needs more memory than the limit"
    for kind, classes in _STORAGE_KINDS:
        if isinstance(error, classes) and not _is_ffmpeg(error):
            return kind, str(error)
    return "corrupt", f"{type(error).__name__}: {error}".splitlines()[0]


def _is_ffmpeg(error: Exception) -> bool:
    """Whether it is FFmpeg's, which has its own ``OSError``."""
    av = sys.modules.get("av")
    return av is not None and isinstance(error, av.FFmpegError)


_STORAGE_KINDS: tuple[tuple[ErrorKind, tuple[type[Exception], ...]], ...] = (
    ("not_found", (ObjectNotFoundError,)),
    ("forbidden", (ObjectForbiddenError,)),
    ("fetch", (StorageError, OSError)),
)


if __name__ == "__main__":
    main()
