import contextlib
import os
import subprocess
import sys
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.data._internal.execution import streaming_executor_state as state

    from pipeline import actors, graph
    from pipeline.ray_data import configured

WAIT = "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S"


@pytest.mark.parametrize("num_cpus", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("num_gpus", [0, 1])
def test_every_stage_fits_beside_the_actors(num_cpus: int, num_gpus: int) -> None:
    resources = graph.choose_resources(num_cpus, num_gpus)
    actors = resources.max_actors * resources.cpus_per_actor
    # One task reads the plan; decode and publish each have as many as they may.
    tasks = (1 + 2 * resources.max_io_tasks) * graph.IO_TASK_CPUS
    assert actors + tasks <= num_cpus


@pytest.mark.parametrize("num_cpus", [1, 2, 16])
def test_tasks_are_as_many_as_wanted_but_fit(num_cpus: int) -> None:
    assert graph.choose_resources(num_cpus, 0, max_io_tasks=1).max_io_tasks == 1
    resources = graph.choose_resources(num_cpus, 0, max_io_tasks=10_000)
    actors = resources.max_actors * resources.cpus_per_actor
    assert resources.max_io_tasks > 1
    assert actors + (1 + 2 * resources.max_io_tasks) * graph.IO_TASK_CPUS <= num_cpus


def test_no_more_actors_than_are_wanted() -> None:
    assert graph.choose_resources(16, 0, max_actors=3).max_actors == 3
    assert graph.choose_resources(16, 4).max_actors == 4
    assert graph.choose_resources(16, 4).gpus_per_actor == 1


@pytest.mark.parametrize("num_cpus", [1, 2, 3, 64])
def test_fused_actors_and_the_task_that_feeds_them_fit(num_cpus: int) -> None:
    resources = graph.choose_resources(num_cpus, 0, graph="fused")
    assert (resources.graph, resources.max_actors) == ("fused", num_cpus)
    actors = resources.max_actors * resources.cpus_per_actor
    assert actors + graph.IO_TASK_CPUS <= num_cpus
    assert resources.max_io_tasks <= 2 * num_cpus
    assert graph.choose_resources(num_cpus, 0).graph == "staged"


def test_one_machine_without_gpus_is_fused() -> None:
    assert graph.choose_graph(0, one_machine=True) == "fused"
    assert graph.choose_graph(1, one_machine=True) == "staged"
    assert graph.choose_graph(0, one_machine=False) == "staged"


def test_a_gpu_is_looked_after_often_while_its_graph_runs() -> None:
    usual = vars(state)[WAIT]
    # Were it called otherwise in another Ray, setting it would do nothing.
    assert WAIT in state.process_completed_tasks.__code__.co_names
    with contextlib.suppress(ZeroDivisionError), configured(for_gpus=True):
        assert vars(state)[WAIT] <= usual / 4
        raise ZeroDivisionError
    with configured(for_gpus=False):
        assert vars(state)[WAIT] == usual


def test_a_gpu_has_more_shards_sent_than_it_works_on() -> None:
    gpu, cpu = actors.GpuActor, actors.WholeActor
    assert gpu.SHARDS_IN_FLIGHT >= 2 * gpu.SHARDS_AT_A_TIME
    # An actor that takes seconds a shard would hold what others could do.
    assert cpu.SHARDS_IN_FLIGHT == cpu.SHARDS_AT_A_TIME


@pytest.mark.parametrize("said", [None, "active"])
def test_beside_a_gpu_threads_that_wait_let_their_cores_go(monkeypatch, said) -> None:
    # Undone even if it was not set.
    monkeypatch.setenv("OMP_WAIT_POLICY", said or "")
    if said is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    seen: list[str] = []
    monkeypatch.setattr(
        actors, "AnnotateActor", lambda *_: seen.append(os.environ["OMP_WAIT_POLICY"])
    )
    actors.GpuActor(None, None)
    assert seen == [said or "passive"]


def test_a_gpu_s_workers_do_not_bring_torch_along_before_its_actor_says_how_it_waits() -> None:
    code = "import sys, pipeline.graph; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
