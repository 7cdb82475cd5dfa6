"""The table of docs/reliability.md with the figures of a run of the tests.

The document says what is promised and which tests prove it; tests say what they saw in lines that
begin with ``PROOF``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
_MARK = "PROOF "
_HEADER = "| promise | proof | figure |\n|---|---|---|"
_ROW = re.compile(r"^\| (?P<promise>.+?) \| (?P<proof>.*?tests/.+?) \| .* \|$", re.MULTILINE)
_TESTS = re.compile(r"tests/[\w/.]+")
_KEYWORD = re.compile(r"-k (\w+)")


@dataclass(frozen=True)
class Promise:
    """A row of the table.

    Attributes:
        text: What is promised.
        proof: The command that proves it.
    """

    text: str
    proof: str

    @property
    def paths(self) -> tuple[str, ...]:
        """The files and folders of tests that the command names."""
        return tuple(_TESTS.findall(self.proof))

    def is_proved_by(self, test: str) -> bool:
        """Whether the command runs a test of this node id."""
        keywords = _KEYWORD.findall(self.proof)
        return test.startswith(self.paths) and (
            not keywords or any(keyword in test for keyword in keywords)
        )


def promises() -> list[Promise]:
    """All rows of the document."""
    rows = _ROW.finditer(DOCUMENT.read_text(encoding="utf-8"))
    return [Promise(row["promise"], row["proof"]) for row in rows]


def promise_of(test: str, among: Iterable[Promise]) -> Promise | None:
    """The one that a test proves; a row that names some tests of a file goes before others."""
    fitting = [promise for promise in among if promise.is_proved_by(test)]
    return max(fitting, key=lambda promise: " -k " in promise.proof, default=None)


def proofs(said: str) -> list[str]:
    """What a test printed as its proof."""
    lines = said.splitlines()
    return [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]


def table(seen: dict[str, list[str]]) -> str:
    """All promises with the figures that came now, in the document's order.

    Args:
        seen: By the tests' node ids, what they printed as proofs.
    """
    tests: dict[Promise, list[str]] = {promise: [] for promise in promises()}
    for test in seen:
        promise = promise_of(test, tests)
        if promise is not None:
            tests[promise].append(test)
    rows = (
        f"| {promise.text} | {promise.proof} | {_figure([seen[test] for test in ran])} |"
        for promise, ran in tests.items()
    )
    return "\n".join([_HEADER, *rows])


def _figure(said: Sequence[list[str]]) -> str:
    lines = sorted({line for lines in said for line in lines})
    tests = f"{len(said)} test{'' if len(said) == 1 else 's'}"
    return "; ".join([tests, *lines]) if lines else f"NO FIGURE CAME ({tests})"
