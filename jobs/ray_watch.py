"""Ends a driver with a clear line where the Ray under it is gone for good: a resume goes on."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

_GRACE_S = 3.0
_HEAD_CHECK_S = 5.0
# A head that is restarted may come back; after 60 s without one Ray ends its drivers wordlessly.
_HEAD_GONE_S = 40.0
_EXIT_INTERRUPTED = 130


def watch_cluster(address: str, ask_head: Callable[[], str]) -> None:
    """Watch this machine's node of a cluster, and its head.

    Ray ends a driver without a word when its own node's raylet dies, and a minute after the head.

    Args:
        address: Of the head, for people.
        ask_head: Gives the name of the gRPC status that it answers with.
    """
    from ray._private import worker

    node = worker._global_node
    _watch(_watch_raylet, node, node.raylet_socket_name)
    _watch(_watch_head, node, address, ask_head)


def watch_embedded() -> None:
    """Watch the embedded Ray's daemons (Ray itself waits a minute).

    A service manager that stops a whole process group takes them along.
    """
    from ray._private import worker

    node = worker._global_node
    _watch(_watch_daemons, node, node.all_processes["raylet"][0].process.pid)


def _watch(watch: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=watch, args=arguments, name="ray-watch", daemon=True).start()


def _is_in_use(node: object) -> bool:
    """Whether this process has not left that Ray; it may have another by now."""
    from ray._private import worker

    return worker._global_node is node


def _watch_raylet(node: object, path: str) -> None:
    while _is_in_use(node):
        if not _await_close(path):
            _stop_at_once(node, "this machine's Ray node was stopped")
        time.sleep(0.05)


def _await_close(path: str) -> bool:
    """Wait until who listens on a Unix socket hangs up; says whether anybody listened at all.

    Looking now and then would be too late: Ray looks as well, and it is a race against its silence.
    """
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            # Busy, for one: only who is surely gone is taken for gone.
            return True
        with contextlib.suppress(OSError):
            line.recv(1)
    return True


def _watch_head(node: object, address: str, ask: Callable[[], str]) -> None:
    # Not since it was last heard: this process may have stood still itself.
    silent_since_s: float | None = None
    while _is_in_use(node):
        time.sleep(_HEAD_CHECK_S)
        asked_s = time.monotonic()
        if ask() not in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}:
            silent_since_s = None
        elif silent_since_s is None:
            silent_since_s = asked_s
        elif time.monotonic() - silent_since_s > _HEAD_GONE_S:
            _stop_at_once(node, f"the head of the Ray cluster at {address} is gone")


def _stop_at_once(node: object, why: str) -> None:
    """End this process unless it is leaving that Ray already; a resume goes on."""
    if _is_in_use(node):
        message = f"segformer3d: {why}; what is committed stays, resume the job\n"
        os.write(2, message.encode())
        os._exit(_EXIT_INTERRUPTED)


def _watch_daemons(node: Any, raylet_pid: int) -> None:
    agent: psutil.Process | None = None
    while _is_in_use(node):
        agent = agent or _agent(raylet_pid)
        if node.dead_processes() or (agent is not None and _is_dead(agent)):
            time.sleep(_GRACE_S)
            _stop_at_once(node, "Ray was stopped")
        time.sleep(1.0)


def _agent(raylet_pid: int) -> psutil.Process | None:
    """The raylet's agent, if it is there yet; what ends both at once, a raylet outlives by 10 s."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(raylet_pid).children():
            command = " ".join(child.cmdline())
            if "DashboardAgent" in command or "dashboard/agent.py" in command:
                return child
    return None


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
