"""On a cluster that exists: run, submit, cancel, resume, and whom we refuse to talk to."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from jobs.cli import run
from jobs.cluster import _answer
from tests.integration.cluster import (
    LoopbackCluster,
    commands_below,
    free_port,
    heads,
    listening,
    running_cluster,
    without_ray,
)
from tests.integration.jobs_under_test import (
    JobUnderTest,
    Row,
    make_archive,
    make_weights,
    wait_for,
)

pytestmark = pytest.mark.ray

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
SETTINGS = ("geometry.short_side_px=64", "shard.frames=4")
END_S = 120.0
# Parts of Ray that watch or resize a cluster.
NOT_EMBEDDED = (
    *("monitor.py", "dashboard.py", "_StatsActor"),
    *("AutoscalingCoordinator", "ActorLocationTracker"),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackCluster]:
    with running_cluster() as found:
        yield found


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_archive(
        tmp_path_factory.mktemp("archive") / "archive", num_frames=20, num_stills=12
    )


@pytest.fixture(scope="module")
def embedded_rows(archive: Path, weights: Path, tmp_path_factory) -> list[Row]:
    """What a run with a Ray of its own makes of the archive; that Ray is looked at meanwhile."""
    home = tmp_path_factory.mktemp("home")
    job = a_job(archive, weights, tmp_path_factory.mktemp("embedded"))
    driver = start(run_arguments(job), HOME=str(home))
    heard: set[str] = set()
    answers: set[str] = set()
    commands: set[str] = set()
    while driver.poll() is None:
        heard |= listening(driver.pid)
        commands |= commands_below(driver.pid)
        answers |= {_answer(address, with_token=False) for address in heads(driver.pid)}
        time.sleep(1.0)
    assert finish(driver)[0] == 0
    assert heard
    assert heard <= LOOPBACK
    assert "UNAUTHENTICATED" in answers
    assert "OK" not in answers, "that Ray lets in whoever has no token"
    assert any("WholeActor" in command for command in commands)
    idle = [command for command in commands if any(word in command for word in NOT_EMBEDDED)]
    assert idle == [], "processes that one machine's job has no use for"
    token = home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    job.check_sound()
    return job.rows()


def a_job(archive: Path, weights: Path, folder: Path) -> JobUnderTest:
    return JobUnderTest(
        archive=str(archive), url=str(folder / "job"), weights=weights, folder=folder
    )


def run_arguments(job: JobUnderTest) -> list[str]:
    arguments = ["run", "--input", job.archive, "--output", job.url]
    arguments += ["--weights", str(job.weights), "--json"]
    return arguments + [part for setting in SETTINGS for part in ("--set", setting)]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=without_ray(os.environ) | environment,
    )


def finish(driver: subprocess.Popen[str], timeout_s: float = END_S) -> tuple[int, str, str]:
    try:
        out, err = driver.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.communicate()
        raise
    return driver.returncode, out, err


def cli(arguments: list[str], **environment: str) -> tuple[int, str, str]:
    return finish(start(arguments, **environment))


def here(capsys, *arguments: str) -> tuple[int, dict]:
    """The verbs that need no Ray, in this process."""
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def write_job(job: JobUnderTest, folder: Path, num_frames: int = 4) -> Path:
    path = folder / "job.yaml"
    fields = {
        "input": {"url": job.archive},
        "output": {"url": job.url},
        "model": {"weights": str(job.weights)},
        "geometry": {"short_side_px": 64},
        "shard": {"frames": num_frames},
    }
    path.write_text(yaml.safe_dump(fields))
    return path


def ray_job(cluster: LoopbackCluster, submission_id: str) -> dict:
    return cluster.ask(f"/api/jobs/{submission_id}")


def wait_for_ray_job(cluster: LoopbackCluster, submission_id: str) -> str:
    ended = {"SUCCEEDED", "FAILED", "STOPPED"}
    wait_for(
        lambda: ray_job(cluster, submission_id)["status"] in ended,
        END_S,
        lambda: cluster.ask(f"/api/jobs/{submission_id}/logs")["logs"],
    )
    return ray_job(cluster, submission_id)["status"]


def test_run_joins_the_cluster_that_ray_address_names(
    cluster: LoopbackCluster,
    archive: Path,
    weights: Path,
    embedded_rows: list[Row],
    tmp_path: Path,
):
    job = a_job(archive, weights, tmp_path)
    code, out, err = cli(run_arguments(job), RAY_ADDRESS=cluster.address, **cluster.environment())
    assert code == 0, err
    assert json.loads(out)["outcome"] == "done"
    job.check_sound()
    assert job.rows() == embedded_rows

    nodes = {
        node["node_id"]: node["resources_total"].get("GPU", 0) for node in cluster.state("nodes")
    }
    assert sorted(nodes.values()) == [0, 1]
    models = cluster.gpu_actors()
    assert [actor["required_resources"].get("GPU") for actor in models] == [1.0]
    assert [nodes[actor["node_id"]] for actor in models] == [1]
    decoded_on = {
        task["node_id"] for task in cluster.state("tasks") if "DecodeShard" in (task["name"] or "")
    }
    assert any(nodes[node] == 0 for node in decoded_on)
    assert listening(cluster.pid) <= LOOPBACK


def test_a_submitted_job_runs_on_without_its_submitter(
    cluster: LoopbackCluster,
    archive: Path,
    weights: Path,
    embedded_rows: list[Row],
    tmp_path: Path,
    capsys,
):
    job = a_job(archive, weights, tmp_path)
    secret = {"AWS_ACCESS_KEY_ID": "the-key", "AWS_SECRET_ACCESS_KEY": "the-secret"}
    code, out, err = cli(
        ["submit", str(write_job(job, tmp_path)), "--address", cluster.dashboard_url],
        # Neither of these may have a say against --address.
        RAY_ADDRESS="127.0.0.1:1",
        RAY_API_SERVER_ADDRESS="http://127.0.0.1:1",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        **secret,
        **cluster.environment(),
    )
    assert (code, out) == (0, f"{job.url}\n"), err
    assert here(capsys, "status", job.url)[1]["state"] in {"submitted", "planning", "running"}

    (known,) = [item for item in cluster.ask("/api/jobs/") if job.url in item["entrypoint"]]
    assert known["metadata"] == {"segformer3d_url": job.url}
    assert set(known["runtime_env"]["env_vars"]) <= {
        "RAY_AUTH_MODE",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
    }
    assert known["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9"
    for value in (*secret.values(), cluster.token_path.read_text()):
        assert value not in json.dumps(known)

    assert wait_for_ray_job(cluster, known["submission_id"]) == "SUCCEEDED"
    _, status, _ = cli(["status", job.url, "--json"])
    assert json.loads(status)["state"] == "done"
    job.check_sound()
    assert job.rows() == embedded_rows


def test_a_submitted_job_is_cancelled_and_resumed(
    cluster: LoopbackCluster, weights: Path, tmp_path: Path, capsys
):
    archive = make_archive(tmp_path / "archive", num_frames=5, num_stills=100)
    job = a_job(archive, weights, tmp_path)
    code, out, err = cli(
        [
            *("submit", str(write_job(job, tmp_path, num_frames=1))),
            *("--address", cluster.dashboard_url, "--json"),
        ],
        **cluster.environment(),
    )
    assert code == 0, err
    submission = json.loads(out)
    assert submission["url"] == job.url
    wait_for(
        lambda: job.num_commits() > 0,
        END_S,
        lambda: cluster.ask(f"/api/jobs/{submission['submission_id']}/logs")["logs"],
    )
    assert here(capsys, "status", job.url)[1]["state"] == "running"
    code, asked = here(capsys, "cancel", job.url)
    assert code == 0
    assert len(asked) == 1

    # To Ray, whatever is not 0 has failed.
    assert wait_for_ray_job(cluster, submission["submission_id"]) == "FAILED"
    assert ray_job(cluster, submission["submission_id"])["driver_exit_code"] == 130
    status = here(capsys, "status", job.url)[1]
    assert status["state"] == "interrupted"
    assert 0 < status["num_done"] < status["num_shards"]
    code, findings = here(capsys, "verify", job.url)
    assert (code, findings["sound"], findings["orphans"]) == (1, True, [])
    kept = job.commits()

    code, out, err = cli(
        ["resume", job.url, "--json"], RAY_ADDRESS=cluster.address, **cluster.environment()
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["outcome"] == "done"
    assert result["num_computed"] == status["num_shards"] - status["num_done"]
    assert kept.items() <= job.commits().items()
    job.check_sound()


def refused(arguments: list[str], *words: str, **environment: str) -> float:
    """Exit code 2 and one line that says each of these; returns how long it took."""
    started = time.monotonic()
    code, out, err = cli(arguments, **environment)
    assert (code, out) == (2, ""), err
    assert err.startswith("segformer3d: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"RAY_AUTH_MODE": ""}, "RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "refuses our token"),
        ({"RAY_AUTH_TOKEN_PATH": "/nonexistent"}, "token"),
    ],
    ids=["no authentication", "wrong token", "no token"],
)
def test_nobody_gets_in_without_the_token(
    cluster: LoopbackCluster, archive: Path, tmp_path: Path, change: dict[str, str], word: str
):
    job = a_job(archive, tmp_path / "untrained", tmp_path)
    environment = cluster.environment() | change
    arguments = ["run", "--input", job.archive, "--output", job.url]
    taken_s = refused(arguments, word, RAY_ADDRESS=cluster.address, **environment)
    assert taken_s < 15
    submit = ["submit", *arguments[1:], "--address", cluster.dashboard_url]
    assert refused(submit, word, **environment) < 15
    assert not Path(job.url).exists()


def test_a_dead_address_is_found_out_at_once(cluster: LoopbackCluster, archive: Path, tmp_path):
    arguments = ["run", "--input", str(archive), "--output", str(tmp_path / "job")]
    address = f"127.0.0.1:{free_port()}"
    environment = cluster.environment()
    assert refused(arguments, address, "no Ray", RAY_ADDRESS=address, **environment) < 15
    submit = ["submit", *arguments[1:], "--address", f"http://{address}"]
    assert refused(submit, address, "no Ray", **environment) < 15
    assert not (tmp_path / "job").exists()


def test_an_open_cluster_is_refused(cluster: LoopbackCluster, archive: Path, tmp_path: Path):
    arguments = ["run", "--input", str(archive), "--output", str(tmp_path / "job")]
    environment = cluster.environment()
    with open_head() as address:
        refused(arguments, "lets anyone in", RAY_ADDRESS=address, **environment)
    with open_jobs_server() as url:
        submit = ["submit", *arguments[1:], "--address", url]
        refused(submit, "lets anyone in", **environment)


@contextlib.contextmanager
def open_head() -> Iterator[str]:
    """The head of a cluster that asks nobody for a token."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def GetClusterId(self, request, context):  # noqa: N802
            return gcs_service_pb2.GetClusterIdReply()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def open_jobs_server() -> Iterator[str]:
    """A Jobs server that asks nobody for a token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ray_version": "2.60.0"}')

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
