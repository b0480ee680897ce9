"""Every public name is documented, and the built site has it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from doc_pages import ROOT, blocks

pycode = pytest.importorskip("sphinx.pycode")
DOCS = ROOT / "docs"
MODULES = (
    "lema", "lema.config", "lema.storage.index", "lema.core.memory", "lema.models.lora", "lema.engine.trainer",
    "lema.models", "lema.data", "lema.training", "lema.chat", "lema.prepare", "lema.report", "lema.errors",
    "lema.prepare.single_file",
)  # fmt: skip
SINGLE = (
    "lema.export.merge.merge", "lema.export.merge.MergeResult", "lema.export.peft_adapter.export_peft",
    "lema.export.gguf_adapter.export_gguf", "lema.export.check.check_adapter", "lema.export.check.Finding",
)  # fmt: skip


def public() -> Iterator[tuple[str, Any]]:
    """Names as they are imported, and what they are."""
    for name in MODULES:
        module = importlib.import_module(name)
        yield name, module
        own = [n for n, o in vars(module).items() if getattr(o, "__module__", None) == name and not n.startswith("_")]
        for member in getattr(module, "__all__", own):
            yield f"{name}.{member}", getattr(module, member)
    for name in SINGLE:
        module, _, member = name.rpartition(".")
        yield name, getattr(importlib.import_module(module), member)


def members(cls: type) -> Iterator[tuple[str, Any, type]]:
    """Public methods and properties of a class, and fields of a dataclass; of our own bases too, once."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("lema"):
            continue
        for name, value in list(vars(base).items()):  # pydantic builds a class when it is first asked
            value = getattr(value, "__func__", value)
            if name.startswith("_") or name in seen or not (callable(value) or isinstance(value, property)):
                continue
            seen.add(name)
            yield name, value, base
        fields = vars(base).get("__annotations__", {}) if dataclasses.is_dataclass(base) else {}
        for name in fields:
            if not name.startswith("_") and name not in seen and "ClassVar" not in str(fields[name]):
                seen.add(name)
                yield name, None, base


def documented_field(cls: type, name: str) -> bool:
    """Whether a field has a line under it, or the class's own docstring names it."""
    notes = pycode.ModuleAnalyzer.for_module(cls.__module__).find_attr_docs()
    return (cls.__qualname__, name) in notes or bool(re.search(rf"\b{name}\b", cls.__doc__ or ""))


def generated_docstring(thing: Any) -> bool:
    """Whether `dataclass` wrote the docstring: the signature."""
    return dataclasses.is_dataclass(thing) and (thing.__doc__ or "").startswith(f"{thing.__name__}(")


def test_every_public_name_is_documented() -> None:
    without, looked = [], 0
    for name, thing in public():
        looked += 1
        if isinstance(thing, str):
            continue
        if not inspect.getdoc(thing) or generated_docstring(thing):
            without.append(name)
        if not inspect.isclass(thing):
            continue
        for member, value, owner in members(thing):
            looked += 1
            found = documented_field(owner, member) if value is None else bool(inspect.getdoc(getattr(thing, member)))
            if not found:
                without.append(f"{name}.{member}")
    assert looked > 300
    assert not without, f"{len(without)} public names have no docstring: {without}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error."""
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(built)]
    done = subprocess.run([*command, "-d", str(built / ".doctrees")], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    return built


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_has_every_public_name(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    found = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    names = {name for kind in found if kind.startswith("py:") for name in found[kind]}
    missing = []
    for name, thing in public():
        if name not in names and not (isinstance(thing, ModuleType) and (site / "api").is_dir()):
            missing.append(name)
        if inspect.isclass(thing):
            homes = {f"{base.__module__}.{base.__qualname__}" for base in thing.__mro__}  # what is inherited: once
            homes |= {other for other, same in public() if same in thing.__mro__}
            for member, _, _ in members(thing):
                if not any(f"{home}.{member}" in names for home in homes):
                    missing.append(f"{name}.{member}")
    assert not missing, f"the site lacks {missing}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_needs_no_network(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|img|link)[^>]+(?:src|href)="(?:https?:)?//""")
    assert not [page.name for page in site.rglob("*.html") if loaded.search(page.read_text(encoding="utf-8"))]
    for name in ("batch", "slot", "memory", "overlap"):
        assert (site / "_images" / f"{name}.svg").is_file()


def test_the_drawings_are_those_of_their_program() -> None:
    sys.path.insert(0, str(DOCS / "drawings"))
    import draw

    for make in draw.DRAWINGS:
        drawing = make()
        assert (DOCS / "drawings" / f"{drawing.name}.svg").read_text(encoding="utf-8") == drawing.text()


def _constants() -> Iterator[str]:
    for file in (ROOT / "src" / "lema").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    said = "\0".join(_constants())
    messages = [block.code for block in blocks(DOCS / "guide" / "troubleshooting.md") if block.language == "text"]
    pieces = [piece.strip() for message in messages for piece in re.split(r"[…\n]", message)]
    assert len(messages) > 10
    strange = [piece for piece in pieces if len(piece) > 3 and piece not in said]
    assert not strange, f"no message of the code has {strange}"
