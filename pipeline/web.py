"""One file from the web, over HTTP(S): bounded in time, from public addresses only.

Each connection, a redirect's too, goes to an address that was checked just before, so a name that
changes its mind between the check and the use gains nothing. Proxies of the environment are not
used: behind one, nothing could be said of where a request ends.
"""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
)

from pipeline.errors import (
    ObjectForbiddenError,
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
)
from pipeline.urls import check_web_url, public_addresses, shown

_STALL_TIMEOUT_S = 30.0
# A server that sends a byte in each of these silences would take for ever.
_PATIENCE_S = 60.0
_SLOWEST_BYTES_PER_S = 10_000
_CHUNK_BYTES = 1 << 20
_KINDS: dict[int, type[StorageError]] = {
    401: ObjectForbiddenError,
    403: ObjectForbiddenError,
    404: ObjectNotFoundError,
    410: ObjectNotFoundError,
}


class WebFile:
    """The body of an answer, read from its beginning."""

    def __init__(self, url: str, answer: HTTPResponse) -> None:
        self._url, self._answer = url, answer
        self._num_bytes, self._started = 0, time.monotonic()

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer at the end only.

        Raises:
            StoreUnavailableError: The connection stalls, crawls, or ends before the body does.
        """
        pieces = bytearray()
        while len(pieces) < size and (piece := self._piece(size - len(pieces))):
            pieces += piece
        return bytes(pieces)

    def _piece(self, size: int) -> bytes:
        try:
            data = self._answer.read1(size)
        except (OSError, HTTPException) as error:
            raise _unavailable(self._url, error) from error
        if not data and self._answer.length:
            raise StoreUnavailableError(f"{shown(self._url)}: the connection ended early")
        self._num_bytes += len(data)
        seconds = time.monotonic() - self._started
        if seconds > _PATIENCE_S and self._num_bytes < seconds * _SLOWEST_BYTES_PER_S:
            message = f"too slow: {self._num_bytes} bytes in {seconds:.0f} s"
            raise StoreUnavailableError(f"{shown(self._url)}: {message}")
        return data


@contextmanager
def open_web(url: str) -> Iterator[WebFile]:
    """Ask for a URL.

    Raises:
        UserError: It is not a URL on the web, or leads to an address that is not public.
        StorageError: It is not there, or cannot be had.
    """
    check_web_url(url)
    try:
        answer = _opener().open(Request(url), timeout=_STALL_TIMEOUT_S)  # noqa: S310 - http(s)
    except HTTPError as error:
        error.close()
        kind = _KINDS.get(error.code, StorageError if error.code < 500 else StoreUnavailableError)
        raise kind(f"{shown(url)}: the server answers {error.code}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise _unavailable(url, error) from None
    with answer:
        yield WebFile(url, answer)


def read_web(url: str, max_bytes: int) -> bytes:
    """A whole file of the web.

    Raises:
        UserError: As ``open_web``.
        StorageError: As ``open_web``, or it has more than ``max_bytes``.
    """
    pieces = bytearray()
    with open_web(url) as file:
        while chunk := file.read(_CHUNK_BYTES):
            pieces += chunk
            if len(pieces) > max_bytes:
                raise StorageError(f"{shown(url)}: more than {max_bytes} bytes")
    return bytes(pieces)


def _opener() -> OpenerDirector:
    """An opener that knows HTTP(S) only: no files, no FTP, no proxies, no passwords."""
    opener = OpenerDirector()
    for handler in (
        _PlainHandler(),
        _SecureHandler(),
        _Redirects(),
        HTTPDefaultErrorHandler(),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


class _Connection(HTTPConnection):
    def connect(self) -> None:
        self.sock = _public_socket(self.host, self.port, self.timeout)


class _SecureConnection(HTTPSConnection):
    def connect(self) -> None:
        plain = _public_socket(self.host, self.port, self.timeout)
        context = ssl.create_default_context()
        self.sock = context.wrap_socket(plain, server_hostname=self.host)


class _PlainHandler(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_Connection, req)


class _SecureHandler(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req)


class NoRedirects(HTTPRedirectHandler):
    """Follows none: a redirection is an answer like any other error."""

    def redirect_request(self, *_: object) -> None:
        """Nowhere."""


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        try:
            target = check_web_url(newurl)
            if req.type == "https" and target.scheme != "https":
                raise URLError("redirected from https to http")
        except Exception:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _public_socket(host: str, port: int, timeout_s: float | None) -> socket.socket:
    """A connection to one of a host's addresses, all of which are public."""
    error: OSError | None = None
    for address in public_addresses(host, port):
        try:
            return socket.create_connection((address, port), timeout_s)
        except OSError as failed:
            error = failed
    raise error or OSError("the host has no address")


def _unavailable(url: str, error: Exception) -> StoreUnavailableError:
    reason = getattr(error, "reason", None) or error
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return StoreUnavailableError(f"{shown(url)}: {' '.join(str(text).split())[:200]}")
