"""What an embedded Ray does without: processes that watch or resize a cluster.

One machine's job needs Ray's directory, its scheduler with two agents, and the workers. Ray starts
besides a monitor for the autoscaler, one for logs, a server for a dashboard without pages, and, as
actors, Ray Data's statistics, its share of an autoscaled cluster and where its actors are: six more
Python processes of 80 to 190 MB each, whose imports are a fifth of what a small job takes on two
cores. Ray 2.60 has no setting for them, so its own parts are replaced by name in the driver; on a
cluster of the user's nothing is.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Self
from uuid import uuid4

from pipeline.replaced import replaced


@contextlib.contextmanager
def lean_start() -> Iterator[None]:
    """Let ``ray.init`` start what has to be there, and nothing else."""
    from ray._private import parameter
    from ray._private.node import Node

    leaner = functools.partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(parameter, "RayParams", leaner))
        stack.enter_context(replaced(Node, "start_api_server", _start_no_api_server))
        yield


@contextlib.contextmanager
def lean_data() -> Iterator[None]:
    """Let Ray Data do without actors of its own, on a Ray that is one machine."""
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.operators import actor_pool_map_operator
    from ray.data._internal.stats import _StatsManager

    with contextlib.ExitStack() as stack:
        for name in _TOLD_STATISTICS:
            stack.enter_context(replaced(_StatsManager, name, staticmethod(_ignore)))
        for owner, name, ours in (
            (_StatsManager, "gen_dataset_id_from_stats_actor", staticmethod(_new_id)),
            (streaming_executor, "create_cluster_autoscaler", _whole_machine),
            (actor_pool_map_operator, "get_or_create_actor_location_tracker", _Nowhere),
            (actor_pool_map_operator, "get_actor_locations", _unknown_locations),
        ):
            stack.enter_context(replaced(owner, name, ours))
        yield


_TOLD_STATISTICS = (
    "register_dataset_to_stats_actor",
    "update_execution_metrics",
    "update_iteration_metrics",
)


def _start_no_api_server(node: Any, **_: object) -> None:
    """Leave only an address there, at which nobody listens.

    Without one, Ray's agent and Ray Train's workers ask for it again and again.
    """
    from ray._private import ray_constants

    node._webui_url = None
    node.get_gcs_client().internal_kv_put(
        ray_constants.DASHBOARD_ADDRESS.encode(),
        b"127.0.0.1:0",
        True,
        namespace=ray_constants.KV_NAMESPACE_DASHBOARD,
    )


def _ignore(*_: object, **__: object) -> None:
    pass


def _new_id() -> str:
    return uuid4().hex


def _whole_machine(*_: object, **__: object) -> Any:
    """An autoscaler that gives a run all there is, from the beginning."""
    import ray
    from ray.data._internal.cluster_autoscaler.base_cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution.interfaces.execution_options import ExecutionResources

    everything = ExecutionResources.from_resource_dict(ray.cluster_resources())

    class WholeMachine(ClusterAutoscaler):
        def try_trigger_scaling(self) -> None:
            pass

        def on_executor_shutdown(self) -> None:
            pass

        def get_total_resources(self) -> ExecutionResources:
            return everything

    return WholeMachine()


def _unknown_locations(*_: object) -> dict[str, str]:
    """Ray Data goes by what each actor said of itself when it began."""
    return {}


class _Nowhere:
    """Stands for the actor that is told where actors are; its use is choosing between nodes."""

    @property
    def update_actor_location(self) -> Self:
        return self

    def remote(self, *_: object) -> None:
        """What every method of an actor has."""
