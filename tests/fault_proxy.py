"""A loopback HTTP proxy in front of the S3 server of the tests that spoils a share of the requests.

It passes the Host header on as it came, so the client's signature stays good.
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, get_args
from urllib.parse import urlsplit

Fault = Literal[
    "503", "reset", "lost acknowledgement", "slow", "409", "412", "short body", "expired"
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
_CODES: dict[Fault, tuple[int, str]] = {
    "503": (503, "SlowDown"),
    "409": (409, "ConditionalRequestConflict"),
    "412": (412, "PreconditionFailed"),
    "expired": (403, "ExpiredToken"),
}
_SHORT_DELAY_S = 0.05
# One slow answer in so many is slower than the client waits.
_TOO_SLOW_EVERY = 8
_NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "expect"}


class FaultProxy(ThreadingHTTPServer):
    """The proxy; ``arm`` says what goes wrong.

    Args:
        endpoint_url: The real server.
        too_slow_s: More than clients wait for an answer.
    """

    daemon_threads = True
    # Clients that give up on us are what we are for.
    request_queue_size = 128

    def __init__(self, endpoint_url: str, too_slow_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(endpoint_url).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.too_slow_s = too_slow_s
        self.num_requests = 0
        self.injected: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._kinds: Sequence[Fault] = ()
        self._rng = random.Random(0)
        self._share = 0.0
        self._requests_left: int | None = None
        self._forbidden: frozenset[str] = frozenset()

    def forbid(self, *paths: str) -> None:
        """Deny access to these paths of the server and no others, for good."""
        self._forbidden = frozenset(paths)

    def is_forbidden(self, path: str) -> bool:
        """Whether access to a path is denied; its query does not count."""
        return path.partition("?")[0] in self._forbidden

    def expire_after(self, num_requests: int | None) -> None:
        """Refuse all requests as of expired credentials once so many are through."""
        with self._lock:
            self._requests_left = num_requests

    def arm(self, kinds: Sequence[Fault], share: float, seed: int) -> None:
        """From now on spoil a share of the requests by one of the kinds that can befall them."""
        with self._lock:
            self._kinds, self._share, self._rng = kinds, share, random.Random(seed)
            self._requests_left = None
            self.num_requests, self.injected = 0, Counter()

    def draw(self, method: str, *, conditional: bool) -> tuple[Fault | None, bool, float]:
        """A request's fate: its fault, whether it takes effect, and seconds of delay."""
        with self._lock:
            self.num_requests += 1
            if self._requests_left is not None:
                if self._requests_left == 0:
                    self.injected["expired"] += 1
                    return "expired", False, 0.0
                self._requests_left -= 1
            kinds = [kind for kind in self._kinds if _befalls(kind, method, conditional)]
            if not kinds or self._rng.random() >= self._share:
                return None, True, 0.0
            kind = self._rng.choice(kinds)
            takes_effect = kind in {"lost acknowledgement", "short body", "slow"}
            if kind in {"409", "412"}:
                takes_effect = self._rng.random() < 0.5
            delay_s = 0.0
            if kind == "slow":
                too_slow = self._rng.randrange(_TOO_SLOW_EVERY) == 0
                delay_s = self.too_slow_s if too_slow else _SHORT_DELAY_S
            self.injected[kind] += 1
            return kind, takes_effect, delay_s

    def handle_error(self, *_: object) -> None:
        """A client that is gone is no news."""


@contextlib.contextmanager
def run_fault_proxy(endpoint_url: str, *, too_slow_s: float) -> Iterator[FaultProxy]:
    """Serve in a thread; it passes everything on until it is armed."""
    proxy = FaultProxy(endpoint_url, too_slow_s)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def _befalls(kind: Fault, method: str, conditional: bool) -> bool:
    if kind in {"409", "412"}:
        return conditional
    return method == "GET" if kind == "short body" else True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.is_forbidden(self.path):
            self._refuse(403, "AccessDenied")
            return
        fault, takes_effect, delay_s = self.server.draw(
            self.command, conditional="If-None-Match" in self.headers
        )
        time.sleep(delay_s)
        answer = self._pass_on(body) if takes_effect else None
        if fault in {"reset", "lost acknowledgement"}:
            self._cut()
        elif fault in _CODES:
            self._refuse(*_CODES[fault])
        elif answer is not None:
            self._answer(*answer, shortened=fault == "short body")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - names that http.server wants

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _NOT_PASSED_ON:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, shortened: bool
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {*_NOT_PASSED_ON, "content-length"}:
                self.send_header(name, value)
        length = len(body)
        if self.command == "HEAD":
            length = int(dict(headers).get("Content-Length", 0))
        if status not in {204, 304}:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if shortened and body:
            self.wfile.write(body[: len(body) // 2])
            self._cut()
        else:
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        body = b""
        if self.command != "HEAD":
            text = f"<Code>{code}</Code><Message>made up by the fault proxy</Message>"
            body = f"<?xml version='1.0'?><Error>{text}</Error>".encode()
        self._answer(status, [("Content-Type", "application/xml")], body, shortened=False)

    def _cut(self) -> None:
        """Reset the connection instead of closing it in good order."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()
