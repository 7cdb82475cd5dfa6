"""`make chaos`: the slow suite within ``CHAOS_MINUTES``, and the table of what it proved.

What needs no Ray goes first, two tests at a time; what starts Ray wants the machine to itself.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.budget import CHAOS_MINUTES
from tests.proofs import table

SUITES = (
    ("-m", "slow and not ray", "-n", "2", "--dist", "worksteal"),
    ("-m", "slow and ray"),
)


def main() -> int:
    """Run both; 1 if a test failed."""
    print(f"chaos: about {CHAOS_MINUTES:g} minutes (CHAOS_MINUTES)", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen_file = Path(folder) / "proofs.json"
        environment = os.environ | {"PROOFS_FILE": str(seen_file)}
        codes = [
            subprocess.run(
                [sys.executable, "-m", "pytest", "-v", *suite], env=environment, check=False
            ).returncode
            for suite in SUITES
        ]
        seen: dict[str, list[str]] = {}
        if seen_file.exists():
            for line in seen_file.read_text(encoding="utf-8").splitlines():
                seen |= json.loads(line)
    print(table(seen))
    minutes = (time.monotonic() - started) / 60
    print(f"chaos: {'FAILED' if any(codes) else 'passed'} in {minutes:.0f} minutes")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
