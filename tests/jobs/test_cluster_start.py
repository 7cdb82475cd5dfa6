"""What a driver says when its own Ray does not start."""

import stat
import sysconfig
import tempfile
from pathlib import Path

import pytest

from jobs import cluster
from jobs.cluster import connect
from jobs.spec import RaySection
from pipeline.errors import JobError


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def give_up(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nAdvice")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray, "init", give_up)
    said = "Ray does not start: The current node timed out"
    with pytest.raises(JobError, match=said) as caught, connect(RaySection()):
        pass
    assert "\n" not in str(caught.value)


def test_its_folder_is_nobody_else_s_and_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    far = tmp_path / ("far" * 20)
    far.mkdir()
    for place in (Path("/tmp"), far):
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        folder = cluster._ray_folder()
        assert folder is not None
        assert len(folder) <= 42
        assert stat.S_IMODE(Path(folder).parent.stat().st_mode) == 0o700
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")
    assert cluster._ray_folder() is None


def test_it_starts_where_our_code_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with cluster._own_folder():
        assert Path.cwd() == Path(cluster.__file__).parents[1]
    assert Path.cwd() == tmp_path
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(Path(cluster.__file__).parents[1]))
    with cluster._own_folder():
        assert Path.cwd() == Path("/")
