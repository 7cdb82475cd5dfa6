"""Handing a job to a cluster: whom the token reaches, and answers that break off."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs.spec import check_spec
from jobs.submit import submit_job
from pipeline.errors import JobError, UserError
from segformer3d.weights import untrained_weights
from tests.jobs.job_parts import TINY, make_job
from tests.web_server import serve

TOKEN = "tok3n" * 13


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    # Ray, once it is imported, looks at the environment no more.
    monkeypatch.setattr("jobs.submit.require_token", lambda: None)
    monkeypatch.setattr(
        "ray._private.authentication.http_token_authentication.get_auth_headers_if_auth_enabled",
        lambda _: {"Authorization": f"Bearer {TOKEN}"},
    )
    weights = tmp_path / "tiny.safetensors"
    weights.write_bytes(untrained_weights(TINY))
    fields = {
        "input": {"url": make_job(tmp_path / "other").spec.input.url},
        "output": {"url": str(tmp_path / "job")},
        "model": {"weights": str(weights)},
    }
    return check_spec(fields, "the job")


@contextmanager
def jobs_server(answer):
    """One that wants a token, and answers a submission with these bytes; what it was sent."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if TOKEN in str(self.headers) else 401)
            self.end_headers()

        def do_POST(self):
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.wfile.write(answer)
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_proxy_of_the_environment_is_not_asked(spec, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with pytest.raises(UserError, match="no Ray Jobs server answers there"):
            submit_job(spec, "http://head.invalid:8265")
        assert proxy.asked == []


def test_an_answer_that_breaks_off_is_one_line(spec):
    broken = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"
    with (
        jobs_server(broken) as (address, _),
        pytest.raises(JobError, match="did not take the job: IncompleteRead"),
    ):
        submit_job(spec, address)


def test_the_folder_where_the_cluster_starts_it_holds_no_modules_of_ours(spec):
    with jobs_server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as (address, sent):
        submit_job(spec, address)
    (asked,) = sent
    assert " -P -m jobs.cli resume " in asked["entrypoint"]
    assert TOKEN not in json.dumps(asked)
