"""A Ray cluster on loopback: by default two nodes, one with CPUs, one that names a GPU.

It lives in a process of its own, which ends with its standard input, so that nothing of it is left
when its caller dies. `python tests/integration/cluster.py SHAPE` is that process; it takes orders
as lines of JSON and answers each with one.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

START_S = 90.0
END_S = 30.0
_STORE_BYTES = 100 << 20

# What each node offers, the head first.
Shape = Sequence[Mapping[str, int]]
CPU_AND_GPU: Shape = ({"num_cpus": 2}, {"num_cpus": 1, "num_gpus": 1})


@dataclass(frozen=True, kw_only=True)
class RayNode:
    """One node of a running cluster.

    Attributes:
        node_id: Ray's name for it, in hex.
        raylet_pid: Its daemon, of which all its workers descend.
        gcs_pid: The cluster's directory, on the head only.
    """

    node_id: str
    raylet_pid: int
    gcs_pid: int | None = None

    def tree(self) -> list[psutil.Process]:
        """Its raylet, and every worker, agent and decoding child below it, as they are now."""
        try:
            raylet = psutil.Process(self.raylet_pid)
            return [raylet, *raylet.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @property
    def is_alive(self) -> bool:
        """Whether its raylet is."""
        try:
            return psutil.Process(self.raylet_pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def kill(self) -> None:
        """Kill all of it at once, as a machine that loses its power."""
        # Stopped first, so that nothing is started while the others are looked for.
        send([self.raylet_pid], signal.SIGSTOP)
        pids = [process.pid for process in self.tree()]
        send(pids if self.gcs_pid is None else [self.gcs_pid, *pids], signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all of it within, as a machine that swaps or is moved, and let it go on after."""
        send([self.raylet_pid], signal.SIGSTOP)
        pids = [process.pid for process in self.tree()]
        send(pids, signal.SIGSTOP)
        try:
            yield
        finally:
            send(pids, signal.SIGCONT)


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal processes, those that are gone already left aside."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass(frozen=True, kw_only=True)
class LoopbackCluster:
    """A running cluster.

    Attributes:
        address: HOST:PORT of its head.
        dashboard_url: Where its Jobs server listens.
        token_path: The file with its token.
        pid: The process that all of it descends from.
        host: That process.
    """

    address: str
    dashboard_url: str
    token_path: Path
    pid: int
    host: subprocess.Popen[str]

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

    def gpu_actors(self) -> list[dict[str, Any]]:
        """What Ray's state API knows of the actors that hold a model beside a GPU."""
        return [a for a in self.state("actors") if "GpuActor" in a["class_name"]]

    def nodes(self) -> list[RayNode]:
        """Every node that was added and not removed, dead or alive, the head first."""
        return [RayNode(**fields) for fields in self._order("nodes")]

    def add_node(self, **resources: int) -> RayNode:
        """Start one more node and wait until the head knows it."""
        return RayNode(**self._order("add", resources=resources))

    def drain(self, node: RayNode, deadline_s: float) -> None:
        """Tell the cluster that this node will go, as a cloud does that takes a machine back."""
        self._order("drain", node_id=node.node_id, deadline_s=deadline_s)

    def remove(self, node: RayNode) -> None:
        """Stop what is left of a node, gently first, and forget it."""
        self._order("remove", node_id=node.node_id)

    def processes(self) -> dict[int, str]:
        """Every living process of the cluster, those that have lost their parents too."""
        return {
            process.pid: " ".join(process.cmdline())
            for process in _processes(self.token_path.parent)
        }

    def _order(self, verb: str, **details: Any) -> Any:
        assert self.host.stdin is not None
        assert self.host.stdout is not None
        self.host.stdin.write(json.dumps({"verb": verb, **details}) + "\n")
        self.host.stdin.flush()
        line = self.host.stdout.readline()
        assert line, "the cluster's process is gone"
        return json.loads(line)


@contextlib.contextmanager
def running_cluster(
    shape: Shape = CPU_AND_GPU, *, dashboard: bool = True, harmed: bool = False, **environ: str
) -> Iterator[LoopbackCluster]:
    """Start a cluster, and see to its end.

    Args:
        shape: What each node offers, the head first.
        dashboard: Whether the head serves jobs and the state API.
        harmed: Whether parts of it are killed, so that others may be left behind.
        **environ: What the environment of all its processes holds besides.
    """
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
        environment |= environ
        request = {"shape": [dict(node) for node in shape]}
        if dashboard:
            request["dashboard_port"] = free_port()
        said = stack.enter_context((folder / "said").open("w+"))
        host = subprocess.Popen(
            [sys.executable, __file__, json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            text=True,
        )
        stack.callback(_end, host, folder, harmed)
        assert host.stdout is not None
        line = host.stdout.readline()
        said.seek(0)
        assert line, said.read()
        yield LoopbackCluster(**json.loads(line), token_path=token_path, pid=host.pid, host=host)


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
    return {host for _, host, _ in _listeners(pid)}


def commands_below(pid: int) -> set[str]:
    """The command lines of all descendants of a process."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found.add(" ".join(process.cmdline()))
    return found


def heads(pid: int) -> set[str]:
    """HOST:PORT of all on which a head of Ray's listens that descends from a process."""
    return {f"127.0.0.1:{port}" for name, _, port in _listeners(pid) if name == "gcs_server"}


def _listeners(pid: int) -> Iterator[tuple[str, str, int]]:
    """Name, host and port of each that listens among a process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        yield process.name(), connection.laddr.ip, connection.laddr.port


def _processes(folder: Path) -> list[psutil.Process]:
    """Every living process of a cluster, those that have lost their parents too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == str(folder):
                found.append(process)
    return found


def _end(host: subprocess.Popen[str], folder: Path, harmed: bool) -> None:
    host.stdin.close()
    host.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        host.wait(END_S)
    # Ray's agents look for their dead daemons for up to a minute before they end.
    _, alive = psutil.wait_procs(_processes(folder), 0 if harmed else END_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    host.wait(END_S)
    assert harmed or not alive, f"left behind: {alive}"


def _serve(shape: Shape, dashboard_port: int | None = None) -> None:
    # Ray prints to standard output too, which belongs to the answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from ray.cluster_utils import Cluster

    local = {"node_ip_address": "127.0.0.1", "object_store_memory": _STORE_BYTES}
    # Another Ray on this machine may have the agent's usual port.
    head = {"include_dashboard": False, "dashboard_agent_listen_port": free_port()}
    if dashboard_port is not None:
        head |= {"include_dashboard": True, "dashboard_port": dashboard_port}
    cluster = Cluster()

    def add(**arguments: Any) -> Any:
        # Ray's own wait is 30 s, too short on a machine that is busy with other things.
        node = cluster.add_node(wait=False, **local, **arguments)
        cluster._wait_for_node(node, START_S)
        return node

    add(**head, **shape[0])
    for resources in shape[1:]:
        add(**resources)

    def answer(order: dict[str, Any]) -> Any:
        if order["verb"] == "add":
            return _describe(add(**order["resources"]))
        if order["verb"] == "nodes":
            return [_describe(node) for node in cluster.list_all_nodes()]
        if order["verb"] == "drain":
            return _drain(cluster.address, order["node_id"], order["deadline_s"])
        (node,) = [item for item in cluster.list_all_nodes() if item.node_id == order["node_id"]]
        return cluster.remove_node(node)

    url = f"http://127.0.0.1:{dashboard_port}" if dashboard_port is not None else ""
    print(json.dumps({"address": cluster.address, "dashboard_url": url}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
    cluster.shutdown()


def _describe(node: Any) -> dict[str, Any]:
    pids = {kind: infos[0].process.pid for kind, infos in node.all_processes.items() if infos}
    return {
        "node_id": node.node_id,
        "raylet_pid": pids["raylet"],
        "gcs_pid": pids.get("gcs_server"),
    }


def _drain(address: str, node_id: str, deadline_s: float) -> None:
    """What `ray drain-node` does."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    accepted, why_not = GcsClient(address=address).drain_node(
        node_id,
        autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,
        "the machine is taken back",
        int((time.time() + deadline_s) * 1000),
    )
    assert accepted, why_not


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
