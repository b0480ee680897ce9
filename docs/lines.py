"""Lines of Python in each room, of revisions of this repository: python docs/lines.py 8a69160 HEAD

Two numbers a revision: all lines, and those with code, which leaves out blank lines, comments and docstrings.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def code_lines(source: str) -> int:
    """Lines with code of a module."""
    texts = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    without = {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({line for t in tokens if t.type not in _NO_CODE for line in range(t.start[0], t.end[0] + 1)} - without)


def room_of(path: str) -> str:
    """The folder below `lema`, a package's name, or `modules`."""
    parts = path.split("/")
    if parts[0] == "packages":
        return parts[1]
    return parts[2] if len(parts) > 3 else "modules"


def rooms_of(revision: str) -> dict[str, tuple[int, int]]:
    """Both numbers by room."""
    every: Counter[str] = Counter()
    code: Counter[str] = Counter()
    for path in git("ls-tree", "-r", "--name-only", revision, "src", "packages").splitlines():
        if path.endswith(".py"):
            source = git("show", f"{revision}:{path}")
            every[room_of(path)] += len(source.splitlines())
            code[room_of(path)] += code_lines(source)
    return {room: (every[room], code[room]) for room in every}


if __name__ == "__main__":
    found = [rooms_of(revision) for revision in sys.argv[1:] or ["HEAD"]]
    for room in sorted(set().union(*found)):
        print(f"{room:12}", *(f"{counts.get(room, (0, 0))[0]:8,} {counts.get(room, (0, 0))[1]:8,}" for counts in found))
