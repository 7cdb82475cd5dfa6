"""What the decoding child and its parent say to each other over a socket pair.

Requests go down as pickles, with the memory file for the pixels beside them. Events come up as
JSON, because a child that has read hostile bytes is not to be trusted with more.
"""

import json
import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Any, cast

from pipeline.records import Asset, Slice
from pipeline.sources.assets import DecodeLimits
from pipeline.storage import StorageOptions

_LENGTH = struct.Struct("<Q")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DecodeItem:
    """Frames of one asset to decode.

    Attributes:
        part: The slice, with the wanted frames only.
        slots: For each of them its place among the shard's planned frames.
    """

    part: Slice
    slots: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Decode these, into the memory file that comes with the message.

    Attributes:
        root: URL of the archive.
        storage: How to reach it.
        limits: Bounds.
        size: Width and height of every slot, in pixels.
        items: What to decode, in order.
    """

    root: str
    storage: StorageOptions
    limits: DecodeLimits
    size: tuple[int, int]
    items: tuple[DecodeItem, ...]


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """Probe these.

    Attributes:
        root: URL of the archive.
        storage: How to reach it.
        limits: Bounds.
        assets: What to probe, in order.
    """

    root: str
    storage: StorageOptions
    limits: DecodeLimits
    assets: tuple[Asset, ...]


Request = DecodeRequest | ProbeRequest
Event = list[Any]


def send_request(channel: socket.socket, request: Request, fd: int | None) -> None:
    """Send a request, and with it a file descriptor."""
    payload = pickle.dumps(request)
    header = _LENGTH.pack(len(payload))
    if fd is None:
        channel.sendall(header)
    else:
        # Eight bytes into a socket that is drained before each request always fit.
        socket.send_fds(channel, [header], [fd])
    channel.sendall(payload)


def receive_request(channel: socket.socket) -> tuple[Request, int | None]:
    """Wait for a request.

    Raises:
        EOFError: The parent is gone.
    """
    header, fds, _, _ = socket.recv_fds(channel, _LENGTH.size, 1)
    if not header:
        raise EOFError
    header += _receive_exactly(channel, _LENGTH.size - len(header))
    payload = _receive_exactly(channel, _LENGTH.unpack(header)[0])
    request = cast("Request", pickle.loads(payload))  # noqa: S301 - our own parent's  # nosec B301
    return request, (fds[0] if fds else None)


def send_event(channel: socket.socket, event: Event) -> None:
    """Send an event."""
    payload = json.dumps(event).encode()
    channel.sendall(_LENGTH.pack(len(payload)) + payload)


def receive_event(channel: socket.socket) -> Event:
    """Wait for an event, as long as the socket's timeout says between two pieces of it.

    Raises:
        EOFError: The child is gone.
        TimeoutError: It says nothing.
        ValueError: It says nonsense.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size))
    event = json.loads(_receive_exactly(channel, length))
    if not isinstance(event, list) or not event:
        message = "not an event"
        raise ValueError(message)
    return event


def _receive_exactly(channel: socket.socket, length: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < length:
        piece = channel.recv(min(_CHUNK_BYTES, length - len(pieces)))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)
