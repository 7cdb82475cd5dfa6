"""What is said while something lasts."""

import io
import re
import subprocess
import sys
import time

import pytest

from jobs import progress
from jobs.progress import Progress


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
def test_nobody_need_hear_it(redirected):
    """Nor does what opens next get the number of the standard error that is closed."""
    program = (
        "import os, sys\n"
        "from jobs import progress\n"
        "progress.sys.stderr is None and progress.hush()\n"
        "taken = os.open(os.devnull, os.O_RDONLY)\n"
        "progress.say('one')\n"
        "with progress.Progress('annotating', 3) as bar:\n"
        "    bar.advance(3)\n"
        "    bar._line()\n"
        "progress.say('two')\n"
        "sys.exit(7 if taken > 2 else 8)\n"
    )
    command = f'exec "$0" -c "$1" {redirected}'
    done = subprocess.run(["sh", "-c", command, sys.executable, program], check=False)
    assert done.returncode == 7


def test_a_verb_without_standard_error():
    command = 'exec "$0" -m jobs.cli weights show 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stdout


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("seen", [io.StringIO, Terminal])
def test_what_is_soon_over_is_not_told_and_what_lasts_to_its_end(monkeypatch, seen):
    monkeypatch.setattr(sys, "stderr", said := seen())
    assert list(progress.track(range(10), "listing", unit="files")) == list(range(10))
    assert said.getvalue() == ""
    monkeypatch.setattr(progress, "_QUIET_FIRST_S", 0.05)
    monkeypatch.setattr(progress, "_TICK_S", 0.02)
    with Progress("annotating", 10, done=2) as bar:
        wait_until(said.getvalue)
        bar.advance(3, bad=1)
        wait_until(lambda: seen is not Terminal or "5/10" in said.getvalue())
        bar.advance(5, bad=2)
    last = said.getvalue().replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith(
        "annotating: 100%" if seen is Terminal else "annotating: 10 of 10 frames"
    )
    assert "bad=2" in last or "bad 2" in last


def test_a_bar_s_first_rate_is_of_all_the_time_that_it_took(monkeypatch):
    monkeypatch.setattr(sys, "stderr", said := Terminal())
    monkeypatch.setattr(progress, "_QUIET_FIRST_S", 0.5)
    monkeypatch.setattr(progress, "_TICK_S", 0.02)
    with Progress("listing", None, unit="files") as bar:
        bar.advance(1000)
        wait_until(said.getvalue)
    rate = float(re.search(r"([\d.]+) files/s", said.getvalue())[1])
    assert rate <= 1000 / 0.5


def wait_until(happened):
    end = time.monotonic() + 20.0
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


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
