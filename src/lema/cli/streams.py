"""What is written to a terminal, a pipe or a file that does not take every character.

It knows streams and their encodings; it knows nothing of what is said.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any


def replace_what_does_not_fit() -> None:
    """Let standard output write a `?` for what its encoding lacks, instead of ending the verb with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that loses nothing: escaped where standard output takes no more than its own alphabet."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "")
    return json.dumps(value, indent=indent, ensure_ascii=not encoding.startswith("utf"))
