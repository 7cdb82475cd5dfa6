"""What stands between us and Ray, without Ray."""

import socket
from pathlib import Path

import pytest

from jobs import cluster


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


def test_a_socket_that_nobody_listens_on_any_more_is_told_from_one_that_is_busy(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "raylet")
    assert not cluster._listens(path)
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(path)
        daemon.listen(1)
        assert cluster._listens(path)
    assert not cluster._listens(path)
