"""What a driver says when its own Ray does not start."""

import pytest

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
