"""What makes a folder complete: a marker, written last, that lists every other file with its size and hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MARKER = "COMPLETE"
_CHUNK = 1 << 20


def write_marker(folder: Path) -> None:
    """Write the marker for what the folder holds now."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    listed = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": _hash(path)} for path in files}
    (folder / MARKER).write_text(json.dumps({"files": listed}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def problem_of(folder: Path, read: bool = True) -> str | None:
    """What is wrong with a folder that should be complete; None if nothing is.

    Args:
        read: compare the hashes too; else only that files are there and have their sizes.
    """
    if not folder.is_dir():
        return "it does not exist"
    marker = folder / MARKER
    if not marker.is_file():
        return f"its {MARKER} file is missing, so saving was not finished"
    try:
        files: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))["files"]
        for name, promised in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != promised["bytes"]:
                return f"{name} is damaged: it has {size} bytes and was saved with {promised['bytes']}"
            if read and _hash(path) != promised["blake2b"]:
                return f"{name} is damaged: its bytes are not those that were saved"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        return f"its {MARKER} file is damaged: {type(error).__name__}: {error}"
    return None


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
