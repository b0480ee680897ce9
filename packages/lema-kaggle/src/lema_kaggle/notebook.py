"""Notebooks of the templates, with the package inside and their parameters set.

Cells and archives are put together here; what the cells do is the templates'.
"""

from __future__ import annotations

import ast
import base64
import functools
import json
import lzma
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import lema
from lema.errors import KaggleError

from .extra import kaggle_extra
from .metadata import notebook as notebook_of
from .wheel import CARRIED, build_wheel, root_of, zipped

with kaggle_extra():
    import nbformat

LARGEST = 1_000_000
"""Bytes of a notebook's JSON; Kaggle does not save larger ones."""
_CELL = re.compile(r"^# %%(?P<kind> \[markdown\])?(?: tags=(?P<tags>\[.*\]))?\n", re.MULTILINE)
_BENCHMARKS = "benchmarks"
_EXTRAS = {"training": ("facts", "plot"), "inference": (), "benchmark": ("bench",)}
"""Of the packages inside, that a template needs: facts for its data, plots."""


def build_notebook(
    name: str, parameters: Mapping[str, Any] | None = None, title: str | None = None, benchmarks: Path | None = None
) -> str:
    """A notebook's JSON.

    Args:
        name: of `metadata.NOTEBOOKS`.
        parameters: values of its first cell, by name, besides those the notebook has of itself.
        benchmarks: folder of the benchmarks, for the notebook that runs them; default: the package's or checkout's.

    Raises:
        KaggleError: an unknown notebook or parameter, or it became too large for Kaggle.
    """
    kind = notebook_of(name)
    values = {"NOTEBOOK": name, **kind.parameters, **(parameters or {})}
    made = nbformat.v4.new_notebook()
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "lema": {"notebook": name, "version": lema.__version__},
    }
    carried = _benchmark_files(benchmarks) if kind.template == "benchmark" else None
    archive = _archive_cell(carried, _EXTRAS[kind.template])
    for markdown, tags, source in _cells(kind.template):
        for cell_markdown, cell_tags, text in _cells("install") if "install" in tags else [(markdown, tags, source)]:
            if "parameters" in cell_tags:
                text = _with_parameters(text, values)
            if "archive" in cell_tags:
                text = archive
            if cell_markdown:
                text = text.replace("TITLE", title or kind.title)
            cell = nbformat.v4.new_markdown_cell(text) if cell_markdown else nbformat.v4.new_code_cell(text)
            cell.id = f"cell-{len(made.cells)}"  # else random: the same notebook is to be the same bytes
            cell.metadata.tags = cell_tags
            made.cells.append(cell)
    nbformat.validate(made)
    text = nbformat.writes(made)
    if len(text.encode()) > LARGEST:
        raise KaggleError(f"{name} is a notebook of {len(text.encode()):,} bytes, and Kaggle takes {LARGEST:,}")
    return str(text)


def parameters_of(text: str) -> dict[str, str]:
    """Name and written value of the parameters of a notebook's JSON."""
    cells = json.loads(text)["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    return dict(re.findall(r"^([A-Z_]+) = ([^#\n]+?)(?:  #.*)?$", source, re.MULTILINE))


def _cells(template: str) -> list[tuple[bool, list[str], str]]:
    """Whether it is text, tags and source of every cell of a template."""
    script = files(__package__).joinpath("templates", f"{template}.py").read_text(encoding="utf-8")
    marks = list(_CELL.finditer(script))
    found = []
    for mark, following in zip(marks, [*marks[1:], None]):
        source = script[mark.end() : following.start() if following else len(script)].strip("\n")
        markdown = mark["kind"] is not None
        if markdown:
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.split("\n"))
        found.append((markdown, list(json.loads(mark["tags"] or "[]")), source.replace("  # fmt: skip", "")))
    return found


def _with_parameters(source: str, values: Mapping[str, Any]) -> str:
    for name, value in values.items():
        pattern = rf"^{re.escape(name)} = (?P<own>[^#\n]*?)(?P<note>  #.*)?$"
        found = re.search(pattern, source, re.MULTILINE)
        if found is None:
            known = ", ".join(re.findall(r"^([A-Z_]+) = ", source, re.MULTILINE))
            raise KaggleError(f"this notebook has no parameter {name}; it has {known}")
        value = _as_own(name, value, found["own"])
        source = f"{source[: found.start()]}{name} = {value!r}{found['note'] or ''}{source[found.end() :]}"
    return source


def _as_own(name: str, value: Any, written: str) -> Any:
    """A value in the type of the one a template has, where that is a plain one."""
    try:
        own = ast.literal_eval(written)
    except ValueError:  # an expression
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        if isinstance(own, bool):
            return words[str(value).lower()]
        return type(own)(str(value))
    except (KeyError, ValueError) as error:
        kind = "true or false" if isinstance(own, bool) else "a whole number" if isinstance(own, int) else "a number"
        raise KaggleError(f"{name}={value} must be {kind}") from error


def _archive_cell(benchmarks: bytes | None, extras: tuple[str, ...]) -> str:
    return f"WHEELS = {_wheels()!r}\nBENCHMARKS = {_encoded(benchmarks)!r}\nEXTRAS = {extras!r}"


@functools.cache
def _wheels() -> str:
    """Compressing them takes two seconds, and a running program's files do not change."""
    return _encoded(zipped([build_wheel(package, compressed=False) for package in CARRIED], compressed=False))


def _encoded(archive: bytes | None) -> str:
    return "" if archive is None else base64.b85encode(lzma.compress(archive, preset=9)).decode()


def _benchmark_files(folder: Path | None) -> bytes:
    package = root_of("lema_kaggle")  # a wheel has them inside, a checkout beside its packages
    places = [package / _BENCHMARKS, package.parents[3] / _BENCHMARKS] if folder is None else [folder]
    root = next((place for place in places if (place / "published.py").is_file()), None)
    if root is None:
        raise KaggleError(
            f"{places[-1]} has no benchmarks, and this notebook carries them: give --benchmarks CHECKOUT/benchmarks"
        )
    found = sorted(root.glob("*.py"))
    return zipped([(f"{_BENCHMARKS}/{path.name}", path.read_bytes()) for path in found], compressed=False)
