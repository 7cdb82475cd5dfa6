"""`make chaos`: the proofs of docs/reliability.md within ``CHAOS_MINUTES``, and its table.

The fast ones come first, those that the table names; what they leave of the time is the slow
suite's. What needs no Ray goes two tests at a time; what starts Ray wants the machine to itself.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.budget import CHAOS_MINUTES
from tests.proofs import promises, table

# Enough for every slow test to begin, and so to do one round.
_LEAST_MINUTES = 1.0


def fast_suites() -> list[Sequence[str]]:
    """What pytest is told for the fast proofs of the table."""
    paths = sorted({path for promise in promises() for path in promise.paths})
    by_files = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    return [
        ("-m", "not slow and not ray and not gpu", *by_files, *paths),
        ("-m", "not slow and ray and not gpu", *paths),
    ]


def slow_suites() -> list[Sequence[str]]:
    """What pytest is told for the slow suite."""
    return [
        ("-m", "slow and not ray", "-n", "2", "--dist", "worksteal"),
        ("-m", "slow and ray"),
    ]


def main() -> int:
    """Run all of them; 1 if a test failed."""
    print(f"chaos: about {CHAOS_MINUTES:g} minutes (CHAOS_MINUTES)", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen_file = Path(folder) / "proofs.json"
        codes = [_run(suite, seen_file, CHAOS_MINUTES) for suite in fast_suites()]
        left = max(CHAOS_MINUTES - (time.monotonic() - started) / 60, _LEAST_MINUTES)
        print(f"chaos: {left:.0f} minutes are left for the slow suite", flush=True)
        codes += [_run(suite, seen_file, left) for suite in slow_suites()]
        lines = seen_file.read_text(encoding="utf-8").splitlines() if seen_file.exists() else []
    print(table({test: said for line in lines for test, said in json.loads(line).items()}))
    minutes = (time.monotonic() - started) / 60
    print(f"chaos: {'FAILED' if any(codes) else 'passed'} in {minutes:.0f} minutes")
    return int(any(codes))


def _run(suite: Sequence[str], seen_file: Path, minutes: float) -> int:
    """Run one; its exit code."""
    environment = os.environ | {"PROOFS_FILE": str(seen_file), "CHAOS_MINUTES": f"{minutes:.2f}"}
    command = [sys.executable, "-m", "pytest", "-v", *suite]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
