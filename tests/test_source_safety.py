"""What the source must never do: read pickles, run text, start shells, write HTML.

Walks the syntax trees of all that runs in a job, a training or a benchmark.
"""

import ast
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("segformer3d", "pipeline", "jobs", "configs", "benchmarks")
UNPICKLERS = {
    *("pickle", "_pickle", "cPickle", "pickle5", "cloudpickle", "cloudpickle_fast"),
    *("marshal", "shelve", "dill", "joblib"),
}
# A decoding child unpickles what its own parent says, over a socket pair; the way back is JSON.
PICKLE_USERS = {"pipeline/decode_messages.py": {"dumps", "loads"}}
OF_PICKLE_USERS = {"imports pickle", "pickle.loads reads pickles"}
SAFE_YAML_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "_StrictLoader"}
UNSAFE_YAML = {
    *("unsafe_load", "unsafe_load_all", "full_load", "full_load_all"),
    *("Loader", "CLoader", "FullLoader", "CFullLoader", "UnsafeLoader", "CUnsafeLoader"),
}
STRANGERS_CODE = {"torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"}
ARROW_UNPICKLERS = {"PyExtensionType", "UnknownExtensionType", "set_auto_load", "deserialize"}
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
# As they are called where a snippet does not say.
CUSTOMARY = {"np": "numpy", "pa": "pyarrow", "pd": "pandas"}

Found = Iterator[tuple[int, str]]
Aliases = Mapping[str, set[str]]


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def aliases_of(tree: ast.Module) -> Aliases:
    """What each imported name may stand for in a file, wherever in it the import is."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for name, full in CUSTOMARY.items():
        found[name].add(full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                first = item.name.partition(".")[0]
                found[item.asname or first].add(item.name if item.asname else first)
        elif isinstance(node, ast.ImportFrom):
            for item in node.names:
                found[item.asname or item.name].add(f"{node.module or ''}.{item.name}")
    return found


def names_of(node: ast.expr, aliases: Aliases) -> set[str]:
    """The dotted names of an expression, as written and by its imports."""
    first, dot, rest = (written := ast.unparse(node)).partition(".")
    return {written} | {f"{full}{dot}{rest}" for full in aliases.get(first, ())}


def imported_unpicklers(tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{item.name}" for item in node.names]
        else:
            continue
        for name in names:
            if name == "pickle.UnpicklingError":
                continue  # what torch.load raises
            for part in name.split("."):
                if part in UNPICKLERS:
                    yield node.lineno, f"imports {part}"
            if name.endswith(".*"):
                yield node.lineno, f"imports {name}, which hides what is called"


def unsafe_uses(tree: ast.Module) -> Found:
    """Calls, and what is handed on as a value and so may be called elsewhere."""
    aliases = aliases_of(tree)
    called: set[ast.expr] = set()
    for node in ast.walk(tree):
        given: dict[str | None, set[str]] = {}
        if isinstance(node, ast.Call):
            called.add(node.func)
            given = {item.arg: names_of(item.value, aliases) for item in node.keywords}
            names = names_of(node.func, aliases)
        elif isinstance(node, ast.Attribute | ast.Name) and node not in called:
            names = names_of(node, aliases)
        else:
            continue
        for text in sorted({text for name in names for text in _unsafe(name, given)}):
            yield node.lineno, text


def _unsafe(name: str, given: Mapping[str | None, set[str]]) -> Iterator[str]:
    """What is wrong with a use, by its dotted name and its keywords' sources."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    owners = set(name.split(".")[:-1])

    def says(keyword: str, *allowed: str) -> bool:
        """Whether a keyword, if it is given, is one of these and nothing else."""
        return any(item in allowed for item in given.get(keyword, allowed))

    rules = {
        "reads pickles": (name == "torch.load" and given.get("weights_only") != {"True"})
        or (last == "read_pickle" and first == "pandas")
        or (last in {"load", "loads", "Unpickler"} and bool(owners & UNPICKLERS)),
        "allows pickles": not says("allow_pickle", "False"),
        "does not say allow_pickle=False": name == "numpy.load" and "allow_pickle" not in given,
        "has no safe loader": name in {"yaml.load", "yaml.load_all"}
        and not given.get("Loader", set()) & SAFE_YAML_LOADERS,
        "makes objects": first == "yaml" and last in UNSAFE_YAML,
        "runs text": name.removeprefix("builtins.") in {"eval", "exec", "compile", "__import__"},
        "starts a shell": not says("shell", "False")
        or (last in SHELLS and first in {"os", "subprocess", "asyncio"}),
        "gives a name that anyone may take first": last == "mktemp",
        "may unpickle": last in ARROW_UNPICKLERS and first == "pyarrow",
        "runs a stranger's code": not says("trust_remote_code", "False") or name in STRANGERS_CODE,
    }
    yield from (f"{name} {text}" for text, broken in rules.items() if broken)


CHECKS: tuple[Callable[[ast.Module], Found], ...] = (imported_unpicklers, unsafe_uses)


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
                if not (relative in PICKLE_USERS and text in OF_PICKLE_USERS)
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
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "pickle.loads"
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
        "load_dataset(name, trust_remote_code=trust)",
        "from torch import load; load(path)",
        "from torch import load as l; l(path, weights_only=False)",
        "import torch as t; t.load(path)",
        "torch.jit.load(path)",
        "from torch import jit; jit.load(path)",
        "import torch.jit as j; j.load(path)",
        "torch.hub.load(name, 'model')",
        "from torch import hub; hub.load(name, 'model')",
        "pandas.read_pickle(path)",
        "pd.read_pickle(path)",
        "from pandas import read_pickle; read_pickle(path)",
        "ray.cloudpickle.loads(data)",
        "from ray import cloudpickle",
        "from ray.cloudpickle import loads",
        "import ray.cloudpickle as c",
        "import pickle5",
        "torch.serialization.pickle.Unpickler(file)",
        "from numpy import load; load(path)",
        "import numpy; numpy.load(path)",
        "import yaml as y; y.load(text)",
        "from yaml import load; load(text, Loader=yaml.FullLoader)",
        "from yaml import unsafe_load; unsafe_load(text)",
        "from yaml import Loader as SafeLoader; yaml.load(text, Loader=SafeLoader)",
        "yaml.load_all(text, Loader=yaml.UnsafeLoader)",
        "yaml.Loader(text).get_data()",
        "from os import system; system(line)",
        "from os import popen as run; run(line)",
        "import os as o; o.system(line)",
        "import subprocess as s; s.getoutput(line)",
        "from builtins import exec as run; run(text)",
        "from tempfile import mktemp; mktemp()",
        "from pyarrow import deserialize; deserialize(data)",
        "map(eval, texts)",
        "read = torch.load",
        "from os import *",
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
        "subprocess.run(words, shell=False)",
        "from torch import load; load(path, weights_only=True)",
        "from numpy import load; load(path, allow_pickle=False)",
        "import yaml as y; y.load(text, Loader=y.CSafeLoader)",
        "from json import load, loads; load(file), loads(text)",
        "from jobs.weights import load_weights as load; load(path)",
        "from os import path; path.join('a', 'b')",
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
