"""Pages of the documentation as blocks of code that run, and what stands in for a real model there.

It knows fences and markers; it knows nothing of what a page is about. A fence is `bash` or `python`, and runs, or it is
`text`, and does not. Before a fence may stand `<!-- skip: reason -->` or `<!-- slow: reason -->`; a page that goes on
where another ends says `<!-- begins after: other.md -->`. A command that is meant to fail ends in `# status 1`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from data_helpers import VOCABULARY, make_tokenizer, write_jsonl
from families import save_tiny

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("bash", "python")
_FENCE = re.compile(r"^(?P<mark>`{3,})(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=mark)[ ]*$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- (?P<kind>skip|slow): (?P<why>[^>]+?) -->\s*\Z")
_BEGINS = re.compile(r"^<!-- begins after: (\S+) -->$", re.MULTILINE)
_STATUS = re.compile(r"#\s*status (\d+)")
_NEEDS_A_SHELL = re.compile(r"[|;&<>$`*]")


@dataclass(frozen=True)
class Block:
    """A fence of a page."""

    page: Path
    line: int
    language: str
    code: str
    kind: str | None
    """'skip', 'slow', or None: runs always."""
    why: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fences of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in _FENCE.finditer(text):
        marker = _MARKER.search(text, 0, fence.start())
        line = text.count("\n", 0, fence.start()) + 1
        kind, why = (marker["kind"], marker["why"]) if marker else (None, "")
        found.append(Block(page, line, fence["language"].strip(), fence["code"], kind, why))
    return found


def prose(page: Path) -> str:
    """A page without its fences."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def stand_ins(folder: Path) -> None:
    """What pages call smollm2 and chat.jsonl, and the folders of a checkout they name."""
    sys.path.insert(0, str(ROOT / "examples"))
    import chat_rows

    save_tiny("llama", folder / "smollm2", vocab_size=VOCABULARY, max_position_embeddings=1024)
    make_tokenizer().save_pretrained(folder / "smollm2")
    write_jsonl(folder / "chat.jsonl", chat_rows.rows(104, seed=1))
    for name in ("examples", "packages", "tasks", "recipes", "src"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)


def run_page(page: Path, folder: Path, slow: bool = False) -> None:
    """Run a page's blocks in a folder, which is filled before with what the page stands on."""
    before = _BEGINS.search(page.read_text(encoding="utf-8"))
    if before is None:
        stand_ins(folder)
    else:
        shutil.copytree(_folder_after(page.parent / before[1]), folder, dirs_exist_ok=True, symlinks=True)
    _run_blocks(page, folder, slow)


@functools.cache
def _folder_after(page: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lema-docs-"))
    run_page(page, folder)
    return folder


def _run_blocks(page: Path, folder: Path, slow: bool) -> None:
    names: dict[str, Any] = {"__name__": "__page__"}
    with _inside(folder):
        for block in blocks(page):
            if block.language not in RUNS or block.kind == "skip" or (block.kind == "slow" and not slow):
                continue
            try:
                if block.language == "python":
                    exec(compile(block.code, str(block), "exec"), names)
                else:
                    _run_bash(block)
            except Exception as error:
                raise AssertionError(f"{block} does not run: {type(error).__name__}: {error}") from error


def _run_bash(block: Block) -> None:
    for command in block.code.replace("\\\n", " ").splitlines():
        said = _STATUS.search(command)
        words = shlex.split(command, comments=True)
        if not words:
            continue
        if words[0] == "lema" and not _NEEDS_A_SHELL.search(command.split(" #")[0]):
            status, output = _lema(words[1:])
        else:
            done = subprocess.run(["bash", "-ec", command], capture_output=True, errors="replace", timeout=1500)
            status, output = done.returncode, done.stdout + done.stderr
        expected = int(said[1]) if said else 0
        assert status == expected, f"`{command}` ended with {status}, not {expected}:\n{output[-3000:]}"


def _lema(words: list[str]) -> tuple[int, str]:
    from lema.cli.app import app

    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder, with this interpreter's commands first and no network for the hub."""
    changed = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    before, kept = Path.cwd(), {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
