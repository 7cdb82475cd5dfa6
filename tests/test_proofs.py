"""The table of docs/reliability.md names tests that exist, and every test that proves something."""

import re
from pathlib import Path

from tests.proofs import Promise, promise_of, promises, proofs, table


def test_every_proof_has_its_promise(project_root: Path) -> None:
    known = promises()
    files = [
        path.relative_to(project_root).as_posix()
        for path in (project_root / "tests").rglob("test_*.py")
    ]
    tests = [
        f"{file}::{name}"
        for file in files
        for name in re.findall(
            r"^\s*def (test_\w+)", (project_root / file).read_text(), re.MULTILINE
        )
    ]
    for promise in known:
        assert any(promise.is_proved_by(test) for test in tests), promise
    proving = [
        file for file in files if "PROOF " in (project_root / file).read_text(encoding="utf-8")
    ]
    assert len(proving) > 10
    for file in {*proving} - {"tests/test_proofs.py"}:
        assert promise_of(f"{file}::test_any_death", known), file


def test_a_row_that_names_tests_goes_before_one_that_names_a_file() -> None:
    whole = Promise("a", "`pytest tests/jobs/test_x.py tests/test_y.py`")
    some = Promise("b", "`pytest tests/jobs/test_x.py -m slow -k kills`")
    assert promise_of("tests/jobs/test_x.py::test_kills[3]", [whole, some]) is some
    assert promise_of("tests/jobs/test_x.py::test_other", [whole, some]) is whole
    assert promise_of("tests/test_y.py::test_kills", [whole, some]) is whole
    assert promise_of("tests/jobs/test_z.py::test_kills", [whole, some]) is None


def test_the_table_has_what_was_seen() -> None:
    said = proofs("something\nPROOF second\nPROOF first\n")
    lines = table({"tests/jobs/test_crashes.py::test_random_kills": said}).splitlines()
    assert len(lines) == 3
    assert lines[0] == "| promise | proof | figure |"
    assert "test_crashes.py -k kills" in lines[2]
    assert lines[2].endswith(" | first; second |")
