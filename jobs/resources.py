"""What a run takes of the machines that Ray offers it."""

from dataclasses import replace

from jobs.cluster import Cluster
from jobs.spec import RaySection
from pipeline.graph import Resources, choose_graph, choose_resources


def resources_for(settings: RaySection, cluster: Cluster, num_shards: int) -> Resources:
    """As the job asks for, within what there is and what it has work for.

    Args:
        settings: The job's own wishes.
        cluster: What there is.
        num_shards: Shards to be done.
    """
    kind = settings.graph
    if kind == "auto":
        kind = choose_graph(cluster.num_gpus, one_machine=cluster.embedded)
    # A model without a shard would only take memory, and Ray would wonder at it.
    max_actors = min(settings.max_actors or num_shards, num_shards)
    resources = choose_resources(
        cluster.num_cpus, cluster.num_gpus, max_actors, settings.max_io_tasks, kind
    )
    if not (cluster.embedded and resources.feeds_gpus):
        return resources
    # Publishing is the shorter: half as many as decode will do.
    wanted = min(resources.max_io_tasks * 3 // 2, 2 * num_shards)
    return replace(resources, early_workers=-(-wanted // resources.max_actors))
