"""Fixtures shared by all tests: S3 servers and the credentials for them."""

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Helpers beside this file are imported as ``tests.s3_server``, wherever pytest is started.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


# Files that take half a minute and more: they come first, or some worker waits at the end.
LONG_FILES = {
    ROOT / "tests" / name
    for name in (
        "simulation/test_seeds.py",
        "simulation/test_more_seeds.py",
        "jobs/test_generations.py",
        "pipeline/test_storage.py",
        "segformer3d/test_gpu.py",
        "segformer3d/test_training.py",
        "jobs/test_train.py",
        "jobs/test_s3_faults.py",
        "jobs/test_no_secret_is_written.py",
        "jobs/test_crashes.py",
    )
}


INTEGRATION = ROOT / "tests" / "integration"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and see to it that ``make test`` finds what starts Ray."""
    for item in items:
        is_ray, is_slow = (item.get_closest_marker(name) is not None for name in ("ray", "slow"))
        if is_ray and not is_slow and INTEGRATION not in item.path.parents:
            message = f"{item.nodeid}: a test that starts Ray belongs into {INTEGRATION.name}/"
            raise pytest.UsageError(message)
    items.sort(key=lambda item: item.path not in LONG_FILES)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Call bytes by their place: what is made while collecting may differ between the workers."""
    return argname if isinstance(val, bytes) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests that passed have printed as proofs: the figures of docs/reliability.md.

    ``make chaos`` gets them by ``PROOFS_FILE``, a JSON object a line, with those that failed.
    """
    from tests.proofs import proofs

    stats = terminalreporter.stats
    seen = {report.nodeid: proofs(report.capstdout) for report in stats.get("passed", ())}
    if path := os.environ.get("PROOFS_FILE"):
        bad = [*stats.get("failed", ()), *stats.get("error", ())]
        failed = {report.nodeid: [f"FAILED: {report.nodeid}"] for report in bad}
        with Path(path).open("a", encoding="utf-8") as file:
            print(json.dumps(seen | failed), file=file)
    lines = {line for lines in seen.values() for line in lines}
    if lines:
        terminalreporter.section("proofs")
        terminalreporter.write_line("\n".join(sorted(lines)))


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def aws_environment() -> Iterator[None]:
    """Credentials and region of the test servers, and nothing of the user's own."""
    from tests.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY_ID)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)
        patch.setenv("AWS_REGION", REGION)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        # Decoding children that were started before would not know of them.
        patch.setattr("pipeline.decode._workers", threading.local())
        yield


@pytest.fixture(scope="session")
def s3_server(aws_environment: None) -> Iterator[str]:
    """Endpoint URL of a real S3 server (seaweedfs), also in ``AWS_ENDPOINT_URL``."""
    from tests.s3_server import run_s3_server

    with run_s3_server() as endpoint_url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint_url)
        yield endpoint_url


@pytest.fixture
def s3_bucket_url(s3_server: str) -> str:
    """A prefix that nobody has used, on the real server."""
    return f"s3://out/{uuid4().hex}"


@pytest.fixture
def job_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a job may lie: a new folder, or on the real server for a test that asks for ``S3``."""
    if getattr(request, "param", "local") == "S3":
        return str(request.getfixturevalue("s3_bucket_url"))
    return str(tmp_path / "job")


@pytest.fixture(scope="session")
def moto_server(aws_environment: None) -> Iterator[str]:
    """Endpoint URL of moto's server with buckets ``frames`` and ``out``; it takes any secret."""
    import boto3
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    from tests.s3_server import BUCKETS, REGION

    # It looks whether a key is there and then writes, and another thread may come in between.
    one_at_a_time, put_object = threading.Lock(), S3Response.put_object

    def put_alone(response: S3Response) -> object:
        with one_at_a_time:
            return put_object(response)

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint_url = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint_url, region_name=REGION)
    for bucket in BUCKETS:
        client.create_bucket(Bucket=bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_alone)
        yield endpoint_url
    server.stop()
