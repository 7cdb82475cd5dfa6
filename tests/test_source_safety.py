"""What the source must never do: read pickles, run text, start shells, write HTML.

Walks the syntax trees of all that runs in a job, a training or a benchmark.
"""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("segformer3d", "pipeline", "jobs", "configs", "benchmarks")
UNPICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# A decoding child unpickles what its own parent says, over a socket pair; the way back is JSON.
PICKLE_USERS = {"pipeline/decode_messages.py": {"dumps", "loads"}}
SAFE_YAML_LOADERS = {"SafeLoader", "CSafeLoader", "_StrictLoader"}
UNSAFE_YAML = {"unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "load_all"}
ARROW_UNPICKLERS = {"PyExtensionType", "UnknownExtensionType", "set_auto_load", "deserialize"}
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}

Found = Iterator[tuple[int, str]]


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def name_of(call: ast.Call) -> str:
    """The dotted name of what is called, as written."""
    return ast.unparse(call.func)


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {item.arg: ast.unparse(item.value) for item in call.keywords}


def imported_unpicklers(tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module == "pickle" and [item.name for item in node.names] == [
                "UnpicklingError"
            ]:
                continue  # what torch.load raises
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.partition(".")[0] in UNPICKLERS:
                yield node.lineno, f"imports {name}"


def unsafe_calls(tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, text) for text in _unsafe(name_of(node), keywords(node)))


def _unsafe(name: str, given: dict[str | None, str]) -> Iterator[str]:
    """What is wrong with a call, by its dotted name and its keywords' source."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    loader = given.get("Loader", "").rpartition(".")[2]
    rules = {
        "reads pickles": name == "torch.load" and given.get("weights_only") != "True",
        "allows pickles": given.get("allow_pickle", "False") != "False",
        "does not say allow_pickle=False": name in {"np.load", "numpy.load"}
        and "allow_pickle" not in given,
        "has no safe loader": name == "yaml.load" and loader not in SAFE_YAML_LOADERS,
        "makes objects": first == "yaml" and last in UNSAFE_YAML,
        "runs text": name.removeprefix("builtins.") in {"eval", "exec", "compile", "__import__"},
        "starts a shell": given.get("shell", "False") != "False"
        or (last in SHELLS and first in {"os", "subprocess", "asyncio"}),
        "gives a name that anyone may take first": last == "mktemp",
        "may unpickle": last in ARROW_UNPICKLERS and first in {"pa", "pyarrow"},
        "runs a stranger's code": given.get("trust_remote_code", "False") != "False",
    }
    yield from (f"{name} {text}" for text, broken in rules.items() if broken)


CHECKS: tuple[Callable[[ast.Module], Found], ...] = (imported_unpicklers, unsafe_calls)


@functools.cache
def faults() -> list[str]:
    found = []
    for path in sources():
        relative = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_bytes(), relative)
        for check in CHECKS:
            found += [
                f"{relative}:{line}: {text}"
                for line, text in check(tree)
                if not (relative in PICKLE_USERS and text == "imports pickle")
            ]
    return found


def test_no_source_reads_pickles_runs_text_or_starts_shells():
    assert len(sources()) > 100
    assert faults() == []


@pytest.mark.parametrize(("path", "functions"), PICKLE_USERS.items())
def test_who_may_pickle_does_it_only_as_said(path, functions):
    tree = ast.parse((ROOT / path).read_bytes())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    }
    assert used == functions
    # Nothing of a store or a file goes into it: only bytes of the socket.
    (call,) = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and name_of(n) == "pickle.loads"
    ]
    assert ast.unparse(call) == "pickle.loads(payload)"
    assert "open(" not in (ROOT / path).read_text()


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "from joblib import load",
        "import marshal, os",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.savez(path, x, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "tempfile.mktemp()",
        "pa.PyExtensionType(kind)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_walk_finds_each_of_them(line):
    tree = ast.parse(f"def f():\n    {line}\n")
    assert [text for check in CHECKS for text in check(tree)]


@pytest.mark.parametrize(
    "line",
    [
        "from pickle import UnpicklingError",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "model.eval()",
        "re.compile(text)",
        "subprocess.run(words)",
    ],
)
def test_the_walk_leaves_the_rest_alone(line):
    tree = ast.parse(f"def f():\n    {line}\n")
    assert [text for check in CHECKS for text in check(tree)] == []


def test_nothing_writes_html():
    """Were there any, it would have to be escaped and under a content security policy."""
    marks = ("<html", "<body", "<div", "<!doctype", "text/html")
    found = [
        str(path.relative_to(ROOT))
        for path in sources()
        if any(mark in path.read_text(encoding="utf-8").lower() for mark in marks)
    ]
    assert found == []
