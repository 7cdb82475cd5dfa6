"""A Ray cluster of two nodes on loopback: one with CPUs and the dashboard, one that names a GPU.

It lives in a process of its own, which ends with its standard input, so that nothing of it is left
when its caller dies. `python tests/integration/cluster.py PORT` is that process.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

START_S = 90.0
END_S = 30.0
_STORE_BYTES = 100 << 20


@dataclass(frozen=True, kw_only=True)
class LoopbackCluster:
    """A running cluster.

    Attributes:
        address: HOST:PORT of its head.
        dashboard_url: Where its Jobs server listens.
        token_path: The file with its token.
        pid: The process that all of it descends from.
    """

    address: str
    dashboard_url: str
    token_path: Path
    pid: int

    def environment(self) -> dict[str, str]:
        """What a driver or a submitter needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}

    def ask(self, path: str) -> Any:
        """JSON that the dashboard answers."""
        host = self.dashboard_url.removeprefix("http://")
        with contextlib.closing(HTTPConnection(host, timeout=30)) as connection:
            authorization = {"Authorization": f"Bearer {self.token_path.read_text()}"}
            connection.request("GET", path, headers=authorization)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            return json.load(answer)

    def state(self, kind: str) -> list[dict[str, Any]]:
        """What Ray's state API knows of its ``nodes``, ``actors`` or ``tasks``, ended ones too."""
        answer = self.ask(f"/api/v0/{kind}?detail=true&limit=9999")
        return list(answer["data"]["result"]["result"])


@contextlib.contextmanager
def running_cluster() -> Iterator[LoopbackCluster]:
    """Start a cluster, and see to its end."""
    with contextlib.ExitStack() as stack:
        # Ray's sockets lie below, and their paths may not be long.
        folder = Path(tempfile.mkdtemp(prefix="s3d-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        token_path = folder / "token"
        token_path.touch(mode=0o600)
        token_path.write_text(secrets.token_hex(32))
        environment = {**without_ray(os.environ), "RAY_AUTH_MODE": "token"}
        # Else Ray's own Jobs agent takes 127.0.0.1 for this machine's outward address.
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        environment |= {"RAY_AUTH_TOKEN_PATH": str(token_path), "RAY_TMPDIR": str(folder)}
        said = stack.enter_context((folder / "said").open("w+"))
        host = subprocess.Popen(
            [sys.executable, __file__, str(free_port())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            text=True,
        )
        stack.callback(_end, host)
        assert host.stdout is not None
        line = host.stdout.readline()
        said.seek(0)
        assert line, said.read()
        yield LoopbackCluster(**json.loads(line), token_path=token_path, pid=host.pid)


def without_ray(environment: Any) -> dict[str, str]:
    """The environment without what it tells Ray."""
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def free_port() -> int:
    """A TCP port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(pid: int) -> set[str]:
    """The addresses on which a process and all its descendants listen."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add(connection.laddr.ip)
    return found


def _end(host: subprocess.Popen[str]) -> None:
    family = psutil.Process(host.pid).children(recursive=True) if host.poll() is None else []
    host.stdin.close()
    host.stdout.close()
    try:
        host.wait(END_S)
    finally:
        _, alive = psutil.wait_procs(family, END_S)
        for process in alive:
            process.kill()
    assert not alive, f"left behind: {alive}"


def _serve(dashboard_port: int) -> None:
    from ray.cluster_utils import Cluster

    local = {"node_ip_address": "127.0.0.1", "object_store_memory": _STORE_BYTES}
    # Another Ray on this machine may have the agent's usual port.
    dashboard = {
        "include_dashboard": True,
        "dashboard_port": dashboard_port,
        "dashboard_agent_listen_port": free_port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args={**local, **dashboard, "num_cpus": 2})
    cluster.add_node(**local, num_cpus=1, num_gpus=1)
    url = f"http://127.0.0.1:{dashboard_port}"
    # Ray prints to standard output too, before this line and not after it.
    print(json.dumps({"address": cluster.address, "dashboard_url": url}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
