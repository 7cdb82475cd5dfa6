"""What a run takes of the machines that Ray offers it."""

import pytest

from jobs.cluster import Cluster
from jobs.resources import resources_for
from jobs.spec import RaySection

LAPTOP = Cluster(num_cpus=8, num_gpus=0, embedded=True)
GPU_MACHINE = Cluster(num_cpus=16, num_gpus=4, embedded=True)
CLUSTER = Cluster(num_cpus=64, num_gpus=0, embedded=False)


@pytest.mark.parametrize(
    ("cluster", "kind", "num_models"),
    [(LAPTOP, "fused", 8), (GPU_MACHINE, "staged", 4), (CLUSTER, "staged", 64)],
)
def test_a_long_job_takes_what_there_is(cluster: Cluster, kind: str, num_models: int) -> None:
    resources = resources_for(RaySection(), cluster, 1000)
    assert (resources.graph, resources.max_actors) == (kind, num_models)


@pytest.mark.parametrize("cluster", [LAPTOP, GPU_MACHINE, CLUSTER])
def test_no_more_models_start_than_there_are_shards(cluster: Cluster) -> None:
    for num_shards in (1, 3):
        assert resources_for(RaySection(), cluster, num_shards).max_actors == num_shards
    wanted = RaySection(max_actors=2)
    assert resources_for(wanted, cluster, 1).max_actors == 1
    assert resources_for(wanted, cluster, 1000).max_actors == 2


def test_the_job_names_its_own_graph_and_tasks() -> None:
    assert resources_for(RaySection(graph="staged"), LAPTOP, 1000).graph == "staged"
    assert resources_for(RaySection(graph="fused"), CLUSTER, 1000).graph == "fused"
    assert resources_for(RaySection(max_io_tasks=1), CLUSTER, 1000).max_io_tasks == 1


def test_workers_are_started_early_beside_gpus_and_for_no_more_than_there_is_to_do() -> None:
    def early(cluster: Cluster, num_shards: int, **settings: object) -> int:
        resources = resources_for(RaySection(**settings), cluster, num_shards)
        return resources.early_workers * resources.max_actors

    assert early(GPU_MACHINE, 1000) == 24
    assert early(GPU_MACHINE, 1000, max_io_tasks=4) == 8
    assert early(GPU_MACHINE, 2) == 4
    assert early(GPU_MACHINE, 1000, graph="fused") == 0
    assert early(LAPTOP, 1000, graph="staged") == 0
    assert early(Cluster(num_cpus=16, num_gpus=4, embedded=False), 1000) == 0
