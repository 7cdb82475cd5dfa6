"""Where a run finds its Ray: the cluster that RAY_ADDRESS names, or one embedded here."""

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

from jobs.spec import RaySection
from pipeline.errors import JobError, UserError

# Enough for two dozen decoded shards; what exceeds it waits (backpressure), so it also bounds
# the memory of a run.
_OBJECT_STORE_BYTES = 1 << 30
_GRACE_S = 3.0
_EXIT_INTERRUPTED = 130
_AUTH_HELP = (
    "set RAY_AUTH_MODE=token on every node and here (`ray get-auth-token --generate` makes a token)"
)


@dataclass(frozen=True)
class Cluster:
    """What Ray offers.

    Attributes:
        num_cpus: CPUs over all nodes.
        num_gpus: GPUs over all nodes.
        embedded: Whether it lives and dies with this process.
    """

    num_cpus: float
    num_gpus: float
    embedded: bool


def require_token_mode() -> None:
    """Refuse to talk to a cluster that lets anyone run code.

    Raises:
        UserError: Unless token authentication is on.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token":
        message = f"Ray without authentication runs anybody's code: {_AUTH_HELP}"
        raise UserError(message)


@contextlib.contextmanager
def connect(settings: RaySection) -> Iterator[Cluster]:
    """Join the cluster that RAY_ADDRESS names, or start an embedded one; leave it at the end.

    Raises:
        UserError: If the cluster is open to anyone, or refuses the token.
        JobError: If it cannot be reached.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's core says at error level that actors with arguments restart badly when their driver
    # dies; ours do not outlive it. That it was told to be quiet it says too: see _quietly.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address and address != "local":
        require_token_mode()
    ray = _import_ray()
    try:
        if address and address != "local":
            _join(address)
        else:
            _embed(settings)
        resources = ray.cluster_resources()
        yield Cluster(
            num_cpus=resources.get("CPU", 1.0),
            num_gpus=resources.get("GPU", 0.0),
            embedded=not address or address == "local",
        )
    finally:
        ray.shutdown()


def _import_ray() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return cast("ModuleType", ray)


def _join(address: str) -> None:
    import ray

    try:
        with _quietly():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        message = f"RAY_ADDRESS={address}: no Ray cluster answers there: {_first_line(error)}"
        raise UserError(message) from None
    except RuntimeError as error:
        message = f"RAY_ADDRESS={address}: {_first_line(error)}"
        raise JobError(message) from None


def _embed(settings: RaySection) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _quietly():
        ray.init(
            address="local",
            num_cpus=settings.num_cpus,
            include_dashboard=False,
            object_store_memory=settings.object_store_bytes or _OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Loopback only: nobody else's business.
            _node_ip_address="127.0.0.1",
        )
    _protect_token()
    threading.Thread(target=_watch_daemons, name="ray-watch", daemon=True).start()


def _watch_daemons() -> None:
    """End this process soon after the embedded Ray dies under it (Ray itself waits a minute).

    A service manager that stops a whole process group takes Ray's daemons along.
    """
    from ray._private import worker

    while (node := worker._global_node) is not None:
        if node.dead_processes():
            time.sleep(_GRACE_S)
            if worker._global_node is None:
                return
            message = "segformer3d: Ray was stopped; what is committed stays, resume the job\n"
            os.write(2, message.encode())
            os._exit(_EXIT_INTERRUPTED)
        time.sleep(1.0)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what Ray's core writes to standard error while it starts; failures still raise."""
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(sink)
        os.close(kept)


def _protect_token() -> None:
    """Ray 2.60 writes its token readable by everyone."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.exists():
            token.chmod(0o600)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
