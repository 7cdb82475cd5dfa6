"""`make test`: every fast test, in as little time as two cores allow.

What needs no Ray goes by files, two at a time. What starts Ray wants the machine to itself, but
waits a quarter of its time: beside it, at the lowest priority, runs what only computes.
"""

import signal
import subprocess
import sys
import tempfile

FAST = "not slow and not gpu"


def main() -> int:
    """Run all of them; 1 if a test failed."""
    by_files = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    codes = [_run(f"not ray and not patient and {FAST}", *by_files)]
    with tempfile.TemporaryFile() as said:
        patient = subprocess.Popen(
            ["nice", "-n", "19", *_pytest(f"patient and {FAST}")],
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            codes += [_run(f"ray and {FAST}", "tests/integration"), patient.wait()]
        finally:
            # Only where it is told to stop; it then ends what it has started, too.
            patient.send_signal(signal.SIGINT)
            patient.wait()
        said.seek(0)
        print(said.read().decode(errors="replace"), flush=True)
    return int(any(codes))


def _run(marks: str, *arguments: str) -> int:
    return subprocess.run(_pytest(marks, *arguments), check=False).returncode


def _pytest(marks: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", marks, *arguments, "--durations", "10"]


if __name__ == "__main__":
    sys.exit(main())
