"""Canary secrets run through every verb: none stands in what is printed or written.

Credentials are good, wrong, expired, or part of a URL, of the environment or of a profile; the
store is real, or one that repeats every header of a request in its answer. The mask that messages
go through is off for the environment's secrets, so that nothing but the code's own care is tested.
Instead of Ray there is a plain loop.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import uuid4

import click
import pytest

from jobs import cli
from jobs.claim import claim_job, reopen_job
from jobs.demo_archive import make_demo_archive
from jobs.spec import check_spec
from pipeline import urls
from pipeline.layout import Generation
from pipeline.storage import StorageOptions, open_store, s3_clients
from segformer3d.weights import untrained_weights
from tests.jobs.job_parts import TINY, plan_job
from tests.jobs.local_graph import without_ray
from tests.media import encode_cv2, picture
from tests.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from tests.secrets_scan import files_below, leaks, objects_in
from tests.web_server import serve

CANARY = "canary-1f6c9e-never-written"
SECRETS = (CANARY, ACCESS_KEY_ID, SECRET_ACCESS_KEY)
RECIPE = {
    "model": {"variant": TINY, "head_width": 16, "depth_activation": "exp"},
    "short_side_px": 64,
    "phases": [{"epochs": 1, "crop_px": [64, 64], "batch": 2}],
    "optimizer": {"kind": "adam", "rate": 1e-3},
}


class Said:
    """Everything that the commands have printed, and their exit codes."""

    def __init__(self, capfd):
        self._capfd = capfd
        self.text = ""

    def run(self, *words):
        """One command; its exit code and what it said."""
        arguments = [str(word) for word in words]
        code = cli.run(arguments)
        captured = self._capfd.readouterr()
        self.text += captured.out + captured.err
        assert "Traceback" not in captured.out + captured.err
        said = captured.out + captured.err
        assert [s for s in SECRETS if s in said] == [], (arguments[0], said)
        return code, captured.out, captured.err

    def refused(self, *words):
        """A command that is the user's mistake: one line."""
        code, out, err = self.run(*words)
        lines = [line for line in err.splitlines() if line.startswith("segformer3d: ")]
        assert (code, out, len(lines)) == (2, "", 1), (words[0], code, out, err)
        return lines[0]


@pytest.fixture
def said(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(urls, "_SECRET_VARIABLES", ())
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with without_ray():
        yield Said(capfd)


@pytest.fixture
def profile(tmp_path_factory, monkeypatch):
    """Makes the credentials those of a profile's file, which lies where no test looks for leaks."""

    def use(**fields):
        path = tmp_path_factory.mktemp("home") / "credentials"
        held = {"aws_access_key_id": ACCESS_KEY_ID, "aws_secret_access_key": SECRET_ACCESS_KEY}
        lines = [f"{name} = {value}" for name, value in (held | fields).items()]
        path.write_text("\n".join(["[tests]", *lines]))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
        monkeypatch.setenv("AWS_PROFILE", "tests")
        return path

    return use


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(untrained_weights(TINY))
    return path


def every_verb(job, output, weights, picture_url, recipe):
    """Each verb's words, on a job and its input."""
    archive = picture_url.rpartition("/")[0]
    return [
        ["plan", "--input", archive, "--output", output, "--weights", weights],
        ["run", "--input", archive, "--output", job, "--weights", weights],
        ["submit", "--input", archive, "--output", output, "--address", "http://127.0.0.1:9"],
        ["status", job],
        ["status", job, "--json"],
        ["list", job.rpartition("/")[0]],
        ["resume", job],
        ["cancel", job],
        ["verify", job, "--json"],
        ["retry", job],
        ["verify", job, "--repair"],
        ["predict", picture_url, "--weights", weights, "--device", "cpu", "--json"],
        ["attention", picture_url, "--weights", weights, "--device", "cpu"],
        ["evaluate", weights, f"job:{job}", "--device", "cpu", "--json", "--limit", "1"],
        ["train", recipe, "--output", "training", "--device", "cpu"],
        ["weights", "show", weights],
        ["weights", "import", weights, "again.safetensors"],
        ["weights", "fetch", "nvidia/none", "fetched.safetensors"],
    ]


def verb_of(words):
    """The verb's name: of a group's, both words."""
    is_group = isinstance(cli.cli.commands[words[0]], click.Group)
    return " ".join(words[:2]) if is_group else words[0]


def verbs():
    """The names of all that the command line can do."""
    for name, command in cli.cli.commands.items():
        if isinstance(command, click.Group):
            yield from (f"{name} {inner}" for inner in command.commands)
        else:
            yield name


def test_no_verb_is_forgotten():
    # The demo, which takes no URL, has a test of its own.
    words = every_verb("s3://a/job", "s3://a/new", "w", "s3://a/in/a.jpg", "recipe.yaml")
    assert {verb_of(item) for item in words} | {"demo"} == set(verbs())


def write_recipe(path, dataset):
    fields = {**RECIPE, "data": [{"dataset": dataset}], "loss": {"classes": 1.0, "depth": 0}}
    path.write_text(json.dumps(fields))
    return path


@pytest.fixture
def s3_job(s3_bucket_url):
    """A finished job on the real server, pictures and a broken input included; its URL."""
    archive = open_store(f"{s3_bucket_url}/archive")
    for index in range(2):
        archive.put(f"{index}.jpg", encode_cv2(picture(seed=index), ".jpg"))
    archive.put("broken.jpg", b"no image at all")
    fields = {
        "input": {"url": f"{s3_bucket_url}/archive"},
        "output": {"url": f"{s3_bucket_url}/jobs/a", "png": True},
        "geometry": {"short_side_px": 64},
        "shard": {"frames": 2},
    }
    job = plan_job(check_spec(fields, "the job"))
    job.publish(range(job.plan.num_shards))
    return job


def test_no_verb_tells_of_good_credentials(
    said, s3_job, s3_bucket_url, weights, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    recipe = write_recipe(tmp_path / "recipe.yaml", f"job:{s3_job.store.url}")
    codes = {}
    for words in every_verb(
        s3_job.store.url,
        f"{s3_bucket_url}/jobs/new",
        weights,
        f"{s3_bucket_url}/archive/0.jpg",
        recipe,
    ):
        if words[0] in {"plan", "run"}:
            words += ["--set", "geometry.short_side_px=64", "--set", "shard.frames=2"]
            words += ["--set", "output.png=true"]
        if "--repair" in words:
            data = next(iter(s3_job.store.list("gen-0000/data/"))).key
            s3_job.store.delete([data])
        codes[verb_of(words)] = max(said.run(*words)[0], codes.get(verb_of(words), 0))
    assert s3_job.store.exists(Generation(2).success_key)  # the first, the retry, the repair
    refused = {"submit": 2, "weights fetch": 1}
    quarantined = dict.fromkeys(("run", "resume", "retry"), 3)
    assert codes == dict.fromkeys(codes, 0) | refused | quarantined, said.text
    objects = list(objects_in(open_store(s3_bucket_url)))
    assert len([name for name, _ in objects if name.endswith(".parquet")]) >= 2
    assert len([name for name, _ in objects if name.endswith(".png")]) >= 4
    files = list(files_below(tmp_path))
    assert {"checkpoint.pt", "log.csv"} <= {name.rpartition("/")[2] for name, _ in files}
    assert leaks(iter(objects + files), SECRETS) == []
    print(f"PROOF canary: {len(codes)} verbs, {len(objects)} objects, {len(files)} files, 0 leaks")


@pytest.mark.parametrize("place", ["environment", "profile"])
def test_no_verb_tells_of_wrong_credentials(
    said, s3_job, s3_bucket_url, weights, tmp_path, monkeypatch, profile, place
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    store = open_store(s3_bucket_url)
    before = dict(objects_in(store))
    if place == "profile":
        profile(aws_secret_access_key=CANARY)
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    recipe = write_recipe(tmp_path / "recipe.yaml", f"job:{s3_job.store.url}")
    words = every_verb(
        s3_job.store.url, f"{s3_bucket_url}/new", weights, f"{s3_bucket_url}/archive/0.jpg", recipe
    )
    for verb in words[:-3]:
        assert said.run(*verb)[0] in {1, 2, 3}, verb
    assert dict(objects_in(store)) == before
    assert leaks(files_below(tmp_path), SECRETS) == []


@contextmanager
def telltale_store(status: int, code: str | None) -> Iterator[str]:
    """A store that refuses everything and repeats the request's headers as it does; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            said = "\n".join(f"{name}: {value}" for name, value in self.headers.items())
            seen.append(said)
            body = said
            if code is not None:
                body = f"<Error><Code>{code}</Code><Message>{said}</Message></Error>"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
        assert any(CANARY in said for said in seen)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "place"),
    [
        (403, "ExpiredToken", "environment"),
        (400, "InvalidRequest", "environment"),
        (418, None, "environment"),
        (418, None, "profile"),
        (503, None, "environment"),
    ],
)
def test_a_store_that_repeats_our_headers_is_not_quoted(
    said, aws_environment, weights, tmp_path, monkeypatch, profile, status, code, place
):
    monkeypatch.setattr(s3_clients, "_MAX_RETRIES", 1)
    monkeypatch.setattr(s3_clients, "_RETRY_TIMEOUT_S", 1)
    if place == "profile":
        profile(aws_session_token=CANARY)
    else:
        monkeypatch.setenv("AWS_SESSION_TOKEN", CANARY)
    recipe = write_recipe(tmp_path / "recipe.yaml", "job:s3://out/job")
    with telltale_store(status, code) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("HF_ENDPOINT", url)
        for words in every_verb(
            "s3://out/job", "s3://out/new", weights, "s3://frames/a.jpg", recipe
        ):
            if words[:2] in (["weights", "show"], ["weights", "import"]):
                continue
            assert said.run(*words)[0] in {1, 2, 3}, words
    assert leaks(files_below(tmp_path), SECRETS) == []


def test_a_profile_s_file_that_is_no_good_is_not_quoted(said, aws_environment, profile):
    path = profile(aws_session_token=CANARY)
    text = path.read_text()
    for broken in (text.replace("[tests]", "[tests"), text.replace("[tests]", "")):
        path.write_text(broken)
        said.refused("status", "s3://out/job")


def test_the_demo_tells_of_no_credentials(said, aws_environment, tmp_path, monkeypatch):
    small = {"num_clips": 1, "frames_per_clip": 12, "num_images": 1, "size": (96, 64)}
    monkeypatch.setattr("jobs.demo.make_demo_archive", partial(make_demo_archive, **small))
    monkeypatch.setenv("AWS_SESSION_TOKEN", CANARY)
    assert said.run("demo", "--folder", "demo")[0] == 0
    assert (tmp_path / "work/demo/demo.png").exists()
    assert leaks(files_below(tmp_path), SECRETS) == []


URLS = [
    f"s3://KEY:{CANARY}@bucket/x",
    f"s3://KEY:a/{CANARY}@bucket/x",
    f"s3://{CANARY}@bucket/x",
    f"https://user:{CANARY}@host.example/x",
    f"https://{CANARY}@host.example/x",
    f"http://user:{CANARY}@127.0.0.1:9/x",
    f"ftp://user:{CANARY}@host.example/x",
    f"simplecache::https://user:{CANARY}@host.example/x",
]


@pytest.mark.parametrize("url", URLS)
def test_no_verb_repeats_a_url_that_holds_a_secret(said, weights, tmp_path, project_root, url):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encode_cv2(picture(), ".jpg"))
    archive, output = tmp_path / "in", f"job-{uuid4().hex}"
    recipe = write_recipe(tmp_path / "recipe.yaml", f"camvid:{url}")
    start = write_recipe(tmp_path / "start.yaml", "scenes:?count=2")
    for verb in ("plan", "run"):
        said.refused(verb, "--input", url, "--output", output)
        said.refused(verb, "--input", archive, "--output", url)
        said.refused(verb, "--input", archive, "--output", output, "--weights", url)
        said.refused(verb, "--input", archive, "--output", output, url)
        said.refused(verb, "--input", archive, "--output", output, "--set", url)
        said.refused(verb, url)
        for section in ("input", "output"):
            for key in ("storage", "storage.endpoint_url", "storage.secret"):
                setting = f"{section}.{key}={url.replace('s3:', 'http:')}"
                said.refused(verb, "--input", archive, "--output", output, "--set", setting)
    for verb in ("status", "list", "resume", "cancel", "verify"):
        said.refused(verb, url)
        said.refused(verb, "s3://out/job", "--endpoint-url", url)
    said.refused("resume", output, "--set", f"input.url={url}")
    for verb in ("predict", "attention"):
        said.refused(verb, url)
        said.refused(verb, archive, "--weights", url)
        said.refused(verb, archive, "--output", url, "--weights", weights)
        said.refused(verb, "s3://out/a.jpg", "--endpoint-url", url)
    for dataset in (f"camvid:{url}", f"job:{url}", f"folder:{url}?labels=x", url):
        said.refused("evaluate", weights, dataset)
    said.refused("evaluate", url, "scenes:?count=1")
    said.refused("evaluate", weights, "scenes:?count=1", "--output", url)
    said.refused("train", recipe, "--output", "training", "--device", "cpu")
    said.refused("train", url, "--output", "training", "--device", "cpu")
    said.refused("train", start, "--output", url, "--device", "cpu")
    setting = f"start.weights={url}"
    said.refused("train", start, "--output", "training", "--device", "cpu", "--set", setting)
    said.refused("weights", "import", url, "out.safetensors")
    said.refused("weights", "import", weights, url)
    said.refused("weights", "show", url)
    said.refused("weights", "fetch", url, "out.safetensors")
    said.refused("submit", "--input", archive, "--output", output, "--address", url)
    assert leaks(files_below(tmp_path), [CANARY, "host.example"]) == [
        f"{path}: {found}"
        for path in (str(recipe),)
        for found in (CANARY, "host.example")
        if found in url
    ]


def test_submit_says_nothing_of_the_token_or_a_password(said, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encode_cv2(picture(), ".jpg"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", CANARY)
    words = ["submit", "--input", tmp_path / "in", "--output", "job", "--address"]
    said.refused(*words, f"http://user:{CANARY}@127.0.0.1:9")
    said.refused(*words, f"user:{CANARY}@127.0.0.1:9")
    said.refused(*words, "http://127.0.0.1:9")
    assert not (tmp_path / "work" / "job").exists()


def test_the_signature_in_a_weights_url_is_not_recorded(said, weights, tmp_path, monkeypatch):
    """A job keeps its weights itself; the URL is only where they came from."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encode_cv2(picture(), ".jpg"))
    monkeypatch.setenv(urls.ALLOW_PRIVATE, "1")
    with serve() as web:
        web.files["/tiny.safetensors"] = weights.read_bytes()
        fields = {
            "input": {"url": str(tmp_path / "in")},
            "output": {"url": str(tmp_path / "job")},
            "geometry": {"short_side_px": 64},
            "model": {"weights": f"{web.url}/tiny.safetensors?X-Amz-Signature={CANARY}"},
        }
        job = claim_job(check_spec(fields, "the job"))
        assert web.asked == [f"/tiny.safetensors?X-Amz-Signature={CANARY}"]
        assert job.store.head(job.record.weights_key) is not None
        assert reopen_job(job.store.url, StorageOptions()).spec.model.weights == (
            f"{web.url}/tiny.safetensors"
        )
        said.run("status", job.store.url)
        said.refused(
            *("run", "--input", tmp_path / "in", "--output", "other"),
            *("--weights", f"{web.url}/none.safetensors?X-Amz-Signature={CANARY}"),
        )
    assert leaks(files_below(tmp_path), [CANARY]) == []
