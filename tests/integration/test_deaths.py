"""Frames that kill the actor which holds the model, in a real job."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.layout import Generation, death_of
from pipeline.sinks.parquet import frame_id
from tests.integration.cluster import running_cluster
from tests.integration.jobs_under_test import (
    END_S,
    SETTINGS,
    JobUnderTest,
    make_archive,
    make_weights,
    wait_for,
)
from tests.media import encode_image

pytestmark = pytest.mark.ray

WHITE = np.full((128, 192, 3), 255, np.uint8)
DEADLY = ("still-003-deadly.png", "still-010-deadly.png")


@pytest.fixture
def job(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "archive", num_frames=5, num_stills=16)
    for name in DEADLY:
        (archive / name).write_bytes(encode_image(WHITE, "PNG"))
    poison = Path(__file__).with_name("deadly")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(poison), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("DEADLY_COUNT", str(tmp_path / "count"))
    made = JobUnderTest(
        archive=str(archive),
        url=str(tmp_path / "job"),
        weights=make_weights(tmp_path / "weights.safetensors"),
        folder=tmp_path / "said",
        settings=SETTINGS,
    )
    with made.nothing_left():
        yield made


def test_a_frame_that_kills_its_actor_is_quarantined_alone(job, monkeypatch, tmp_path):
    monkeypatch.setenv("DEADLY", "segfault")
    driver = job.run()
    prefix = Generation().attempts_prefix
    # Killed after the first deaths are on record: the count must outlive the driver.
    wait_for(lambda: any(True for _ in job.store.list(prefix)), END_S, lambda: driver.said)
    driver.send_group(signal.SIGKILL)
    driver.end()
    job.wait_until_idle()
    driver = job.resume()
    assert driver.end() == 3, driver.said
    job.check_sound()
    bad = {row[0]: row[2] for row in job.rows() if row[1] != "ok"}
    assert bad == {frame_id(name, 0): "crash" for name in DEADLY}
    deaths = [death_of(item.key) for item in job.store.list(prefix)]
    at_frames = [death for death in deaths if isinstance(death[1], int)]
    assert len(at_frames) == 2 * len(DEADLY)
    # One that fell with its driver is not counted.
    tries = len((tmp_path / "count").read_text())
    assert len(deaths) <= tries <= len(deaths) + 2
    print(f"PROOF deadly frames: {len(DEADLY)}, actors lost {tries}, rows lost 0")


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "at_a_time"), [("staged", 1), ("fused", 2)])
def test_a_lost_device_replaces_the_actor_and_costs_no_frame(job, monkeypatch, graph, at_a_time):
    monkeypatch.setenv("DEADLY", "device")
    driver = job.run("--set", f"ray.graph={graph}")
    assert driver.end() == 0, driver.said
    job.check_sound()
    deaths = [death_of(item.key) for item in job.store.list(Generation().attempts_prefix)]
    # Another shard in the same process may not be quite at rest yet, and then counts as well.
    assert 1 <= len(deaths) <= at_a_time
    assert {place for _, place in deaths} == {"shard"}


@pytest.mark.slow
def test_a_frame_that_kills_a_gpu_s_actor_is_quarantined_alone(job, monkeypatch, tmp_path):
    """What else had been sent to the actor by then is done again, and no frame of it is blamed."""
    monkeypatch.setenv("DEADLY", "segfault")
    with running_cluster() as cluster:
        environment = {"RAY_ADDRESS": cluster.address, **cluster.environment()}
        driver = replace(job, environment=environment).run()
        assert driver.end() == 3, driver.said
        models = cluster.gpu_actors()
    assert [actor["required_resources"].get("GPU") for actor in models] == [1.0]
    job.check_sound()
    bad = {row[0]: row[2] for row in job.rows() if row[1] != "ok"}
    assert bad == {frame_id(name, 0): "crash" for name in DEADLY}
    deaths = [death_of(item.key) for item in job.store.list(Generation().attempts_prefix)]
    assert len([death for death in deaths if isinstance(death[1], int)]) == 2 * len(DEADLY)
    assert len(deaths) == len((tmp_path / "count").read_text())
