"""Fetching published weights from a real local server that speaks the hub's endpoints."""

import contextlib
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs import cli
from jobs.fetch import _trouble, fetch_weights
from pipeline.errors import JobError, UserError
from tests.web_server import serve

NAME = "tiny/segformer"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny SegFormer as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 32, 80, 128], depths=[1, 1, 1, 1], decoder_hidden_size=16, num_labels=19
    )
    folder = tmp_path_factory.mktemp("published")
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    return folder


class Hub(BaseHTTPRequestHandler):
    """Just the download endpoint: /OWNER/MODEL/resolve/REVISION/FILE."""

    folder = None

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        owner, model, _, revision, file = (self.path.split("?")[0].split("/", 5)[1:] + [""] * 5)[:5]
        if f"{owner}/{model}" != NAME:
            return self._refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if not (self.folder / file).is_file():
            return self._refuse(404, "EntryNotFound")
        body = (self.folder / file).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
        return None

    def _refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("TheHub", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The test's own cache of the hub's library."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(published, cache):
    """The server's address."""
    with serving(published) as address:
        yield address


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_are_fetched_and_imported(hub, published, tmp_path):
    from segformer3d.weights import load_weights
    from segformer3d.weights_file import read_info

    target = tmp_path / "tiny.safetensors"
    expected = sha256(published / "model.safetensors")
    report = fetch_weights(NAME, str(target), sha256=expected.upper(), endpoint=hub)
    assert (report.sha256, report.revision) == (expected, COMMIT)
    assert report.target_sha256 == sha256(target)
    assert expected in report.text()
    info = read_info(target)
    assert info.config.variant == "mit:16,32,80,128:1,1,1,1"
    assert info.depth_codec is None
    assert NAME in info.training_data
    assert COMMIT in info.training_data
    load_weights(target)
    # Once more without a network: from the cache, the same bytes.
    again = tmp_path / "again.safetensors"
    fetch_weights(NAME, str(again), revision=COMMIT, endpoint="http://127.0.0.1:9")
    assert again.read_bytes() == target.read_bytes()


def test_another_sha256_is_refused_and_nothing_written(hub, tmp_path):
    target = tmp_path / "tiny.safetensors"
    with pytest.raises(JobError, match=r"its sha256 is .* nothing was written"):
        fetch_weights(NAME, str(target), sha256="0" * 64, endpoint=hub)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny/none", {}, "no model of that name"),
        ("../etc/passwd", {}, "no name on the hub"),
        (NAME, {"revision": "v9"}, "no revision v9"),
        (NAME, {"sha256": "abc"}, "64 hexadecimal digits"),
    ],
)
def test_what_the_hub_does_not_have_is_the_user_s_mistake(hub, tmp_path, name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        fetch_weights(name, str(tmp_path / "x.safetensors"), endpoint=hub, **options)
    assert "\n" not in str(caught.value)


def test_a_repository_without_parameters_is_refused(cache, published, tmp_path):
    only_config = tmp_path / "only"
    only_config.mkdir()
    (only_config / "config.json").write_bytes((published / "config.json").read_bytes())
    with (
        serving(only_config) as address,
        pytest.raises(UserError, match=r"neither model\.safetensors nor"),
    ):
        fetch_weights(NAME, str(tmp_path / "x"), endpoint=address)


def test_another_architecture_is_refused(cache, published, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    fields = json.loads((published / "config.json").read_text()) | {"architectures": ["Bert"]}
    (other / "config.json").write_text(json.dumps(fields))
    (other / "model.safetensors").write_bytes(b"x")
    with (
        serving(other) as address,
        pytest.raises(UserError, match=r"on the hub: config\.json names"),
    ):
        fetch_weights(NAME, str(tmp_path / "x"), endpoint=address)


def test_a_hub_that_redirects_has_answered_and_its_target_is_not_asked(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with serve() as hub, serve("127.0.0.2") as neighbour:
        hub.redirects["/"] = f"{neighbour.url}/latest/meta-data"
        assert _trouble(f"{hub.url}/") is None
        assert (hub.asked, neighbour.asked) == (["/"], [])


def test_without_a_network_one_line_says_how_to_do_it_by_hand(cache, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code = cli.run(["weights", "fetch", NAME, str(tmp_path / "x.safetensors")])
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err.count("\n") == 1
    assert "cannot be reached (" in captured.err
    assert "weights import FOLDER TARGET" in captured.err
