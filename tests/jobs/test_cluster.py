"""What stands between us and Ray, without Ray."""

import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest

from jobs import cluster, ray_watch


def test_rays_news_are_said_once_and_not_where_the_result_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_news_said", set())
    news = f"The node with node id: 3f\n has been marked dead. {'Advice. ' * 100}"
    for _ in range(3):
        cluster._pass_on({"lines": [news], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Ray: The node with node id: 3f has been marked dead. Advice.")
    assert err.count("\n") == 1
    assert len(err) < 250


def test_ray_prints_its_news_through_us() -> None:
    worker = cluster._import_ray()._private.worker
    assert worker.print_to_stdstream is cluster._pass_on
    assert "print_to_stdstream" in worker.listen_error_messages.__code__.co_names


def test_who_hangs_up_is_noticed_at_once_and_who_is_gone_is_told_from_who_is_there(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "raylet")
    assert not ray_watch._await_close(path)
    with socket.socket(socket.AF_UNIX) as daemon, ThreadPoolExecutor(1) as threads:
        daemon.bind(path)
        daemon.listen(1)
        waiting = threads.submit(ray_watch._await_close, path)
        line, _ = daemon.accept()
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        line.close()
        assert waiting.result(timeout=5)
    assert not ray_watch._await_close(path)


class DeadNode:
    def dead_processes(self):
        return ["raylet"]


@pytest.mark.parametrize("follows", [False, True])
def test_a_watch_is_of_one_ray_though_another_begins_at_once(monkeypatch, capfd, follows):
    worker = cluster._import_ray()._private.worker
    node, exits = DeadNode(), []

    def exit_with(code):
        exits.append(code)
        worker._global_node = None

    monkeypatch.setattr(worker, "_global_node", node)
    monkeypatch.setattr(ray_watch, "_GRACE_S", 0.2)
    monkeypatch.setattr(ray_watch.os, "_exit", exit_with)
    watch = Thread(target=ray_watch._watch_daemons, args=(node, os.getpid()))
    watch.start()
    if follows:
        worker._global_node = DeadNode()
    watch.join(20.0)
    assert not watch.is_alive()
    assert exits == ([] if follows else [130])
    assert ("Ray was stopped" in capfd.readouterr().err) != follows


@pytest.mark.parametrize(
    ("num_cpus", "has_gpu", "shared_gib", "expected_gib"),
    [
        (1, False, 64, 1),
        (4, False, 64, 1),
        (16, False, 64, 4),
        (64, False, 16, 8),
        (64, False, 1, 1),
        (16, True, 64, 16),
        (16, True, 16, 8),
        (64, True, 128, 25),
    ],
)
def test_the_object_store_grows_with_the_cpus_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
    num_cpus: int,
    has_gpu: bool,
    shared_gib: int,
    expected_gib: int,
) -> None:
    usage = shutil._ntuple_diskusage(shared_gib << 30, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(cluster, "_SHARED_MEMORY", Path("/"))
    monkeypatch.setattr(cluster, "_memory_bytes", lambda: 100 << 30)
    assert cluster.object_store_bytes(num_cpus, has_gpu=has_gpu) == expected_gib << 30
