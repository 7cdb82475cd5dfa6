"""What is said while something lasts."""

import time

from jobs import progress
from jobs.progress import Progress


def test_a_stall_is_told_each_time_and_progress_is_none(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_TICK_S", 0.02)
    monkeypatch.setattr(progress, "_STALLED_S", 0.5)

    def num_notices():
        return capsys.readouterr().err.count("nothing comes")

    with Progress("annotating", 10, if_stalled="nothing comes") as bar:
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            bar.advance(0)
            time.sleep(0.01)
        assert num_notices() == 0
        time.sleep(1.3)  # silence itself is what is tested: two stalls fit, on a busy machine one
        assert num_notices() in {1, 2}
    with Progress("annotating", 10):
        time.sleep(0.8)
    assert num_notices() == 0
