"""What holds in every module: no private name of another one, no circle, no long file without a reason, no docstring
that repeats a name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(
    path.parent for pattern in ("src/*", "packages/*/src/*") for path in ROOT.glob(f"{pattern}/__init__.py")
)
MODULES = {
    ".".join(
        (path.parent if path.name == "__init__.py" else path.with_suffix("")).relative_to(package.parent).parts
    ): path
    for package in PACKAGES
    for path in sorted(package.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

MOST_LINES = 400
REASON = re.compile(r"\bone (file|module|table)\b", re.IGNORECASE)


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported; not those of functions or for type checkers."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            waiting += statement.orelse
            continue
        yield statement
        waiting += [inner for inner in ast.iter_child_nodes(statement) if isinstance(inner, ast.stmt)]
        for handler in getattr(statement, "handlers", []):
            waiting += handler.body


def origin(module: str, statement: ast.ImportFrom) -> str:
    """The module a `from` statement names, in full."""
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - statement.level + MODULES[module].name.startswith("__init__")]
    return ".".join(parts + ([statement.module] if statement.module else []))


def imported(module: str) -> set[str]:
    """Modules of ours that are imported when this one is."""
    found: set[str] = set()
    for statement in at_import(TREES[module]):
        if isinstance(statement, ast.ImportFrom):
            base = origin(module, statement)
            inner = {f"{base}.{alias.name}" for alias in statement.names if f"{base}.{alias.name}" in MODULES}
            found |= inner
            if len(inner) < len(statement.names):  # a name of the package itself
                found.add(base)
        elif isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
    return found & MODULES.keys() - {module}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches every other one (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        path.append(name)
        for other in sorted(arrows[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in path:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = path[path.index(name) :]
            del path[path.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return found


def test_no_private_name_of_another_module_is_imported() -> None:
    private = [
        f"{module}: from {origin(module, statement)} import {alias.name}"
        for module, tree in TREES.items()
        for statement in ast.walk(tree)
        if isinstance(statement, ast.ImportFrom)
        and origin(module, statement).split(".")[0] in {p.name for p in PACKAGES}
        for alias in statement.names
        if alias.name.startswith("_") and not alias.name.endswith("__")
    ]
    assert not private


def test_no_module_imports_itself_by_others() -> None:
    assert not circles({module: imported(module) for module in MODULES})


def test_circles_are_found() -> None:
    arrows = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set()}
    assert circles(arrows) == [["a", "b", "c"]]


def test_a_long_module_says_why() -> None:
    long = {
        module: lines
        for module, path in MODULES.items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
        and not REASON.search(ast.get_docstring(TREES[module]) or "")
    }
    assert not long


def words(text: str) -> list[str]:
    """Of a name or a sentence, without articles and endings: `read_pieces` and "Reads the pieces." are the same."""
    found = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())
    return [word.rstrip("s") for word in found if word not in ("a", "an", "the", "this", "its", "of")]


def repeating(module: str) -> Iterator[str]:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            said = ast.get_docstring(node)
            if said and words(said) == words(node.name):
                yield f"{module}:{node.lineno} {node.name}: {said}"


def test_no_docstring_repeats_its_name() -> None:
    assert not [line for module in MODULES for line in repeating(module)]


@pytest.mark.parametrize(
    ("name", "said", "same"),
    [
        ("read_pieces", "Reads the pieces.", True),
        ("SlotLayout", "The slot layout.", True),
        ("close", "Let go of the files.", False),
        ("rates", "Tokens a second, time left.", False),
    ],
)
def test_repetition_is_recognised(name: str, said: str, same: bool) -> None:
    assert (words(name) == words(said)) == same


def test_what_tests_share_lies_in_one_place() -> None:
    """No test file imports another one, and helpers lie in `tests/support` or are packages."""
    tests = ROOT / "tests"
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[-1].startswith("test_")], path
    beside = {path.name for path in tests.glob("*/*.py") if not path.name.startswith("test_")}
    shared = {path.name for folder in ("support", "virtual_device") for path in (tests / folder).glob("*.py")}
    assert beside == shared and [path.name for path in tests.glob("*.py")] == ["conftest.py"]


def test_only_one_module_calls_fsync() -> None:
    calls = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "fsync" and module.startswith("lema.")
    }
    calls -= {"lema.planning.probe"}  # a file to time a disk with
    assert calls == {"lema.storage.atomic"}
