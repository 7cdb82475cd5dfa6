"""What is replaced of Ray while an embedded one runs is Ray's own again afterwards."""

import contextlib
import pickle
from types import SimpleNamespace

import pytest
import ray.data  # noqa: F401  as wherever a Ray is started
from ray._private import parameter
from ray._private.node import Node
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.stats import _StatsManager

from jobs.lean_ray import lean_data, lean_start

REPLACED = [
    (parameter, "RayParams"),
    (Node, "start_api_server"),
    (_StatsManager, "register_dataset_to_stats_actor"),
    (_StatsManager, "update_execution_metrics"),
    (_StatsManager, "update_iteration_metrics"),
    (_StatsManager, "gen_dataset_id_from_stats_actor"),
    (streaming_executor, "create_cluster_autoscaler"),
    (actor_pool_map_operator, "get_or_create_actor_location_tracker"),
    (actor_pool_map_operator, "get_actor_locations"),
]


def test_all_is_put_back_whatever_happens() -> None:
    before = [vars(owner)[name] for owner, name in REPLACED]
    with contextlib.suppress(ZeroDivisionError), lean_start(), lean_data():
        within = [vars(owner)[name] for owner, name in REPLACED]
        assert not set(map(id, before)) & set(map(id, within))
        raise ZeroDivisionError
    assert [vars(owner)[name] for owner, name in REPLACED] == before


def test_ray_still_starts_what_is_left_out_by_these_names() -> None:
    """Were they called otherwise in another Ray, leaving them out would go unnoticed."""
    with lean_start():
        lean = parameter.RayParams(num_cpus=1)
        node, told = Node.__new__(Node), []
        node.get_gcs_client = lambda: SimpleNamespace(
            internal_kv_put=lambda *a, **_: told.append(a)
        )
        node.start_api_server(include_dashboard=False, raise_on_failure=False)
    assert (lean.no_monitor, lean.include_log_monitor, lean.num_cpus) == (True, False, 1)
    assert node._webui_url is None
    assert told == [(b"dashboard", b"127.0.0.1:0", True)]
    usual = parameter.RayParams(num_cpus=1)
    assert (usual.no_monitor, usual.include_log_monitor) == (False, None)


def test_nobody_is_told_where_actors_are() -> None:
    with lean_data():
        tracker = pickle.loads(  # noqa: S301  what an actor is given
            pickle.dumps(actor_pool_map_operator.get_or_create_actor_location_tracker())
        )
        assert tracker.update_actor_location.remote("actor", "node") is None
        assert actor_pool_map_operator.get_actor_locations(("actor",)) == {}
        assert _StatsManager.update_iteration_metrics("any", "thing") is None
        one, other = (_StatsManager.gen_dataset_id_from_stats_actor() for _ in range(2))
    assert one != other


@pytest.mark.parametrize("context", [lean_start, lean_data])
def test_a_ray_that_has_no_such_part_is_found_out(
    context: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {lean_start: (Node, "start_api_server"), lean_data: (_StatsManager, REPLACED[2][1])}
    monkeypatch.delattr(*name[context])
    with pytest.raises(KeyError), context():
        pass
