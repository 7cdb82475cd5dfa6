"""A web server on loopback for tests: files from memory, redirects, and what it was asked."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class WebServer:
    """What a server holds.

    Attributes:
        url: Of its root.
        files: Bodies by path, without the query.
        redirects: Targets by path.
        promised: Content lengths that are said instead of the true ones, by path.
        pauses: Seconds after each byte, by path.
        asked: Paths with their queries, in order.
        headers: Of each request.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    promised: dict[str, int] = field(default_factory=dict)
    pauses: dict[str, float] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serve(host: str = "127.0.0.1") -> Iterator[WebServer]:
    """Serve until the end."""
    held = WebServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            held.asked.append(self.path)
            held.headers.append(dict(self.headers))
            path = self.path.partition("?")[0]
            if path in held.redirects:
                self.send_response(302)
                self.send_header("Location", held.redirects[path])
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif path in held.files:
                data = held.files[path]
                self.send_response(200)
                self.send_header("Content-Length", str(held.promised.get(path, len(data))))
                self.end_headers()
                if path in held.pauses:
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(held.pauses[path])
                else:
                    self.wfile.write(data)
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815 - of what redirects or is missing, which has no body

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:
                self.close_connection = True  # the client had enough

    server = ThreadingHTTPServer((host, 0), Handler)
    held.url = f"http://{host}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
