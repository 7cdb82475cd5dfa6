"""`make audit`: bandit over the source, pip-audit over the lock file; with `bandit`, that alone.

Exit code 0: both clean. 1: something was found. 2: nothing was found, but the database of known
vulnerabilities could not be reached for all packages, so nothing is known of those: not a pass.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
SOURCES = ("segformer3d", "pipeline", "jobs", "configs", "benchmarks", ".ci")
# Asked about first, alone: where there is no answer for it, two hundred questions are spared.
PROBE = "click"
OPTIONS = ["--disable-pip", "--require-hashes", "--progress-spinner", "off", "-f", "json"]
CLEAN, FOUND, NOT_REACHED = 0, 1, 2


def main() -> int:
    """Run both; the exit code."""
    if not bandit():
        return FOUND
    return CLEAN if sys.argv[1:] == ["bandit"] else audit()


def bandit() -> bool:
    """Whether it finds nothing; what it finds is printed."""
    done = subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-c", "pyproject.toml", "-r", *SOURCES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    is_clean = done.returncode == 0
    # Of a clean run there are only warnings of marks whose line is looked at more than once.
    print("bandit: clean" if is_clean else f"{done.stdout}{done.stderr}\nbandit: NOT clean")
    return is_clean


def audit() -> int:
    """Ask for known vulnerabilities of what is locked; CLEAN, FOUND or NOT_REACHED."""
    text = LOCK.read_text(encoding="utf-8")
    answer = ask(entry(text, PROBE))
    if answer is None or unknown(answer):
        print("pip-audit: its database was NOT REACHED: the dependencies are not audited")
        return NOT_REACHED
    answer = ask(text)
    if answer is None:
        print("pip-audit: its database was NOT REACHED: the dependencies are not audited")
        return NOT_REACHED
    vulnerable = [item for item in answer if item.get("vulns")]
    for item in vulnerable:
        ids = ", ".join(fault["id"] for fault in item["vulns"])
        print(f"pip-audit: {item['name']} {item.get('version')}: {ids}")
    for item in unknown(answer):
        print(f"pip-audit: {item['name']}: NOT REACHED: {item['skip_reason']}")
    if vulnerable:
        return FOUND
    print(f"pip-audit: {len(answer) - len(unknown(answer))} of {len(answer)} packages known clean")
    return NOT_REACHED if unknown(answer) else CLEAN


def entry(text: str, name: str) -> str:
    """The lines of one package in a lock file."""
    start = text.index(f"\n{name}==") + 1
    end = text.index("    # via", start)
    return text[start:end]


def ask(requirements: str) -> list[dict[str, Any]] | None:
    """What pip-audit says of each package; None if it got no answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *OPTIONS, "-r", file.name],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    return found or None


def unknown(answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Packages of which the database says nothing; pip-audit itself lets them pass."""
    return [item for item in answer if "skip_reason" in item]


if __name__ == "__main__":
    sys.exit(main())
