"""The table of docs/reliability.md names tests that exist, and every test that proves something."""

import ast
import json
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests import chaos
from tests.proofs import Promise, promise_of, promises, proofs, table

# This file itself speaks of proofs only.
OWN = "tests/test_proofs.py"


@dataclass(frozen=True)
class Source:
    """A file of tests as it is written, not run.

    Attributes:
        root: The project's folder.
        path: The file, relative to that.
    """

    root: Path
    path: str

    @cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        return {node.name: node for node in self._tree.body if isinstance(node, ast.FunctionDef)}

    @cached_property
    def saying(self) -> set[str]:
        """Functions that print a proof, or call one that does."""
        said = self._imported()
        while True:
            more = {name for name, node in self.functions.items() if _says(node, said)} | said
            if more == said:
                return said
            said = more

    def tests(self, names: set[str]) -> dict[str, ast.FunctionDef]:
        """By node id, those of these that are tests."""
        return {
            f"{self.path}::{name}": node
            for name, node in self.functions.items()
            if name in names and name.startswith("test_")
        }

    @cached_property
    def _tree(self) -> ast.Module:
        return ast.parse((self.root / self.path).read_text(encoding="utf-8"))

    def _imported(self) -> set[str]:
        said: set[str] = set()
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                path = f"{(node.module or '').replace('.', '/')}.py"
                if (self.root / path).exists():
                    saying = _source(self.root, path).saying
                    said |= {alias.name for alias in node.names if alias.name in saying}
        return said


@cache
def _source(root: Path, path: str) -> Source:
    return Source(root, path)


def _says(function: ast.FunctionDef, saying: set[str]) -> bool:
    return any(
        (isinstance(node, ast.Constant) and str(node.value).startswith("PROOF "))
        or (isinstance(node, ast.Name) and node.id in saying)
        for node in ast.walk(function)
    )


@pytest.fixture(scope="module")
def sources(project_root: Path) -> list[Source]:
    files = sorted((project_root / "tests").rglob("test_*.py"))
    return [Source(project_root, path.relative_to(project_root).as_posix()) for path in files]


def test_every_row_names_tests_that_exist(sources: list[Source], project_root: Path) -> None:
    rows = re.findall(
        r"^\| .*tests/", (project_root / "docs/reliability.md").read_text(), re.MULTILINE
    )
    known = promises()
    assert len(known) == len(rows) > 15
    tests = [test for source in sources for test in source.tests(set(source.functions))]
    for promise in known:
        assert all((project_root / path).exists() for path in promise.paths), promise
        assert any(promise.is_proved_by(test) for test in tests), promise


def test_every_row_gets_a_figure_in_chaos(sources: list[Source]) -> None:
    proved: dict[Promise, list[str]] = {promise: [] for promise in promises()}
    for source in sources:
        for test in source.tests(source.saying if source.path != OWN else set()):
            promise = promise_of(test, proved)
            assert promise is not None, f"{test} proves nothing that is promised"
            proved[promise].append(test)
    assert [promise.text for promise, tests in proved.items() if not tests] == []
    # Whatever is fast or slow, with Ray or without, is in one of the suites.
    wanted = {suite[1] for suite in [*chaos.fast_suites(), *chaos.slow_suites()]}
    assert wanted == {
        "not slow and not ray and not gpu",
        "not slow and ray and not gpu",
        "slow and not ray",
        "slow and ray",
    }
    for suite in chaos.fast_suites():
        assert {path for promise in proved for path in promise.paths} <= set(suite)


def test_a_row_that_names_tests_goes_before_one_that_names_a_file() -> None:
    whole = Promise("a", "`pytest tests/jobs/test_x.py tests/test_y.py`")
    some = Promise("b", "`pytest tests/jobs/test_x.py -m slow -k kills`")
    assert promise_of("tests/jobs/test_x.py::test_kills[3]", [whole, some]) is some
    assert promise_of("tests/jobs/test_x.py::test_other", [whole, some]) is whole
    assert promise_of("tests/test_y.py::test_kills", [whole, some]) is whole
    assert promise_of("tests/jobs/test_z.py::test_kills", [whole, some]) is None


def test_the_table_has_every_row_and_what_was_seen() -> None:
    said = proofs("something\nPROOF second\nPROOF first\n")
    lines = table(
        {
            "tests/jobs/test_crashes.py::test_random_kills": said,
            "tests/jobs/test_disk_full.py::test_nothing": [],
        }
    ).splitlines()
    assert lines[0] == "| promise | proof | figure |"
    assert len(lines) == 2 + len(promises())
    (kills,) = (line for line in lines if "test_crashes.py -k kills" in line)
    assert kills.endswith(" | 1 test; first; second |")
    others = [line for line in lines[2:] if line != kills]
    assert all(re.search(r"\| NO FIGURE CAME \([01] tests?\) \|$", line) for line in others)
    (full,) = (line for line in others if "test_disk_full.py" in line)
    assert full.endswith(" (1 test) |")


def test_the_fast_proofs_leave_the_slow_ones_the_rest_of_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock_s = iter(range(0, 10_000, 30 * 60))
    told: list[tuple[str, float]] = []

    def run(suite: list[str], _: Path, minutes: float) -> int:
        told.append((suite[1], minutes))
        return 0

    monkeypatch.setattr(chaos, "CHAOS_MINUTES", 100.0)
    monkeypatch.setattr(chaos, "_run", run)
    monkeypatch.setattr(chaos.time, "monotonic", lambda: next(clock_s))
    assert chaos.main() == 0
    assert [minutes for suite, minutes in told if suite.startswith("slow")] == [70, 70]
    assert capsys.readouterr().out.count("NO FIGURE CAME (0 tests)") == len(promises())


def test_a_run_writes_down_what_passed_and_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.conftest import pytest_terminal_summary

    stats = {
        "passed": [
            SimpleNamespace(nodeid="a", capstdout="PROOF one\nsomething\n"),
            SimpleNamespace(nodeid="b", capstdout=""),
        ],
        "failed": [SimpleNamespace(nodeid="c", capstdout="PROOF none\n")],
    }
    shown: list[str] = []
    reporter = SimpleNamespace(stats=stats, section=shown.append, write_line=shown.append)
    monkeypatch.setenv("PROOFS_FILE", str(tmp_path / "proofs"))
    pytest_terminal_summary(cast("pytest.TerminalReporter", reporter))
    assert json.loads((tmp_path / "proofs").read_text()) == {
        "a": ["one"],
        "b": [],
        "c": ["FAILED: c"],
    }
    assert shown == ["proofs", "one"]
