"""Where a run finds its Ray: the cluster that RAY_ADDRESS names, or one embedded here."""

import contextlib
import logging
import os
import secrets
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from jobs.lean_ray import lean_data, lean_start
from jobs.progress import say
from jobs.ray_watch import watch_cluster, watch_embedded
from jobs.spec import RaySection
from pipeline.deaths import private_folder
from pipeline.errors import JobError, UserError

# What exceeds the object store waits (backpressure), so it also bounds the memory of a run. As many
# decoded shards as are in work at a time have to fit, and there is a decoding task per core.
_OBJECT_STORE_BYTES = 1 << 30
_OBJECT_STORE_BYTES_PER_CPU = 256 << 20
# A decode task is allowed while its shard fits into what is left of a share of half the store: with
# 256 MiB a CPU, 5 of 14 decoded at a time, and an H200 was idle for half of the time.
_OBJECT_STORE_BYTES_PER_CPU_GPU = 1 << 30
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Ray's own choice  # nosec B108
# A socket's path has 107 bytes, and what Ray adds 65.
_RAY_FOLDER_BYTES = 42
_IDLE_WORKER_MS = "600000"
_ANSWER_S = 5.0
_RAYLET_S = 10.0
_NEWS_CHARS = 200
_AUTH_HELP = (
    "set RAY_AUTH_MODE=token on every node and here (`ray get-auth-token --generate` makes a token)"
)
OPEN_CLUSTER = f"that cluster lets anyone in and runs anybody's code: {_AUTH_HELP}"
AUTH_SOURCES = "from RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"


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


def check_cluster() -> None:
    """Refuse a bad RAY_ADDRESS before any work is done; without one there is nothing to check.

    Raises:
        UserError: If no cluster answers there, if it is open to anyone, or refuses our token.
    """
    named = _named_cluster()
    if named is not None:
        require_token()
        _find_cluster(named)


def require_token() -> None:
    """Refuse to talk to a cluster without authentication, which lets anyone run code.

    Raises:
        UserError: Unless token authentication is on and there is a token.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token":
        message = f"Ray without authentication runs anybody's code: {_AUTH_HELP}"
        raise UserError(message)
    _import_ray()
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.exceptions import AuthenticationError

    try:
        ensure_token_if_auth_enabled(None, create_token_if_missing=False)
    except (AuthenticationError, RuntimeError) as error:
        message = f"RAY_AUTH_MODE=token, but {_first_line(error)}"
        raise UserError(message) from None


@contextlib.contextmanager
def connect(settings: RaySection) -> Iterator[Cluster]:
    """Join the cluster that RAY_ADDRESS names, or start an embedded one; leave it at the end.

    Raises:
        UserError: If the cluster is not there, is open to anyone, or refuses the token.
        JobError: If it cannot be joined.
    """
    named = _named_cluster()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's core says at error level that actors with arguments restart badly when their driver
    # dies; ours do not outlive it. That it was told to be quiet it says too: see _quietly.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if named is not None:
        require_token()
    ray = _import_ray()
    with contextlib.ExitStack() as stack:
        if named is None:
            # Until Ray is gone: Ray Data's threads may outlive what is read of them.
            stack.enter_context(lean_data())
        stack.callback(ray.shutdown)
        if named is not None:
            _join(_find_cluster(named))
        else:
            _embed(settings)
        resources = ray.cluster_resources()
        yield Cluster(
            num_cpus=resources.get("CPU", 1.0),
            num_gpus=resources.get("GPU", 0.0),
            embedded=named is None,
        )


def _named_cluster() -> str | None:
    named = os.environ.get("RAY_ADDRESS")
    return None if named in {None, "", "local"} else named


def _import_ray() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data
    # What stops a run is raised as well; Ray would print its traceback besides.
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ray._private.worker.print_to_stdstream = _pass_on
    return cast("ModuleType", ray)


_news_said: set[str] = set()


def _pass_on(data: dict[str, Any], ignore_prefix: bool = False) -> None:
    """Say once what Ray has to tell; it would print it on standard output, the result's place."""
    for line in data["lines"]:
        text = " ".join(str(line).split())
        if text not in _news_said:
            _news_said.add(text)
            say(f"Ray: {text[:_NEWS_CHARS]}{'...' if len(text) > _NEWS_CHARS else ''}")


def _find_cluster(named: str) -> str:
    """Where the cluster ``named`` answers, once it is sure that it answers us and not anyone.

    Ray itself gives up on a wrong token after 20 s and on a dead address after two minutes.
    """
    from ray._private import services

    where = f"RAY_ADDRESS={named}"
    if "://" in named:
        message = f"{where}: name HOST:PORT of the cluster's head and start on one of its nodes"
        raise UserError(message)
    try:
        with _literal_loopback():
            address = cast("str", services.canonicalize_bootstrap_address(named))
    except (ValueError, ConnectionError) as error:
        message = f"{where}: {_first_line(error)}"
        raise UserError(message) from None
    if not _uses_tls() and _answer(address, with_token=False) == "OK":
        message = f"{where}: {OPEN_CLUSTER}"
        raise UserError(message)
    answer = _answer(address, with_token=True)
    if answer == "UNAUTHENTICATED":
        message = f"{where}: the cluster refuses our token ({AUTH_SOURCES})"
        raise UserError(message)
    if answer != "OK":
        message = f"{where}: no Ray cluster answers there ({answer.lower()})"
        raise UserError(message)
    return address


def _answer(address: str, *, with_token: bool) -> str:
    """What a cluster's head says to the simplest question: the name of a gRPC status."""
    import grpc  # type: ignore[import-untyped]
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    options = [("grpc.enable_http_proxy", 0)]
    if with_token:
        channel = init_grpc_channel(address, options)
    else:
        channel = grpc.insecure_channel(address, options)
    with channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def _uses_tls() -> bool:
    """Ray's TLS demands a certificate of both sides, so such a cluster is not open."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in {"1", "true"}


def _join(address: str) -> None:
    import ray

    _await_raylet(address)
    try:
        with _quietly(), _literal_loopback(), _own_folder():
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError) as error:
        message = f"the Ray cluster at {address}: {_first_line(error.__cause__ or error)}"
        raise JobError(message) from None
    watch_cluster(address, lambda: _answer(address, with_token=True))


def _await_raylet(address: str) -> None:
    """A driver works through a node on its own machine."""
    from ray._private import services

    deadline = time.monotonic() + _RAYLET_S
    while not services.find_node_ids():
        if time.monotonic() > deadline:
            message = (
                f"this machine is not a node of the Ray cluster at {address}: run on one of its "
                "nodes, or hand the job over with `segformer3d submit`"
            )
            raise UserError(message)
        time.sleep(0.2)


def _embed(settings: RaySection) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray ends workers beyond one per CPU that have been idle for a second, and those between two
    # shards are. Starting them, and their decoding children, anew took a fifth of all CPU time.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", _IDLE_WORKER_MS)
    _make_token()
    # Loopback only: nobody else's business.
    try:
        with _quietly(), _literal_loopback(), _own_folder(), lean_start():
            ray.init(
                address="local",
                num_cpus=settings.num_cpus,
                include_dashboard=False,
                object_store_memory=settings.object_store_bytes
                or object_store_bytes(settings.num_cpus or os.cpu_count() or 1, has_gpu=_has_gpu()),
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _node_ip_address="127.0.0.1",
                _temp_dir=_ray_folder(),
            )
    except Exception as error:
        # On a machine that is very busy Ray gives up with a bare Exception.
        message = f"Ray does not start: {_first_line(error)}; go on with `segformer3d resume`"
        raise JobError(message) from error
    watch_embedded()


def object_store_bytes(num_cpus: int, *, has_gpu: bool) -> int:
    """What an embedded Ray's object store takes unless told.

    No more than half of its room or a quarter of this machine's, or container's, memory.
    """
    per_cpu = _OBJECT_STORE_BYTES_PER_CPU_GPU if has_gpu else _OBJECT_STORE_BYTES_PER_CPU
    wanted = num_cpus * per_cpu
    if _SHARED_MEMORY.is_dir():
        wanted = min(wanted, shutil.disk_usage(_SHARED_MEMORY).total // 2)
    return max(_OBJECT_STORE_BYTES, min(wanted, _memory_bytes() // 4))


def _memory_bytes() -> int:
    from ray._common.utils import get_system_memory

    return int(get_system_memory())


def _has_gpu() -> bool:
    """Whether Ray will find a GPU here; torch would cost the driver half a gigabyte."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    gpus = get_accelerator_manager_for_resource("GPU")
    is_hidden = gpus.get_current_process_visible_accelerator_ids() == []
    return not is_hidden and gpus.get_current_node_num_accelerators() > 0


def _ray_folder() -> str | None:
    """Where an embedded Ray has its sockets; its own choice would be open to every user."""
    if os.environ.get("RAY_TMPDIR"):
        return None
    folder = private_folder() / "ray"
    if len(os.fsencode(folder)) > _RAY_FOLDER_BYTES:
        folder = private_folder(Path("/tmp")) / "ray"  # noqa: S108 - ours alone  # nosec B108
    return str(folder)


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """Let Ray start where our code lies, or in the root folder if Python finds that anyway.

    It makes the driver's folder the first place where workers look for modules: in an archive of
    somebody else's, a `cv2.py` would run.
    """
    code = Path(__file__).resolve().parents[1]
    is_installed = str(code) in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    with contextlib.chdir("/" if is_installed else code):
        yield


@contextlib.contextmanager
def _literal_loopback() -> Iterator[None]:
    """Let Ray take 127.0.0.1 at its word.

    It reads it as this machine's outward address, and what it starts then listens on all of them;
    a cluster that listens on loopback alone it would not find.
    """
    from ray._private import ray_constants

    kept = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


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


def _make_token() -> None:
    """Make the embedded Ray's token before Ray does, which would let everyone read it."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    token = Path.home() / ".ray" / "auth_token"
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=token.parent) as file:
            file.write(secrets.token_hex(32))
            file.flush()
            with contextlib.suppress(FileExistsError):
                token.hardlink_to(file.name)
        token.chmod(0o600)
    except OSError:
        # No home to write to: the environment of this process and its children does as well.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
