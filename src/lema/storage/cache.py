"""Files that can be made again: where they are kept, and how little is lost where they cannot be."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .atomic import replaced_file

logger = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """`$LEMA_CACHE`, `$XDG_CACHE_HOME/lema` or `~/.cache/lema`, made if missing; None where it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(os.environ.get("LEMA_CACHE") or Path(base if os.path.isabs(base) else "~/.cache") / "lema")
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def digest(*parts: object) -> str:
    """A short name for what the parts say."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogateescape")).hexdigest()[:20]


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> bool:
    """Write a file whole or not at all; False, with a warning, where the disk does not take it."""
    try:
        with replaced_file(path) as aside, open(aside, "wb") as file:
            write(file)
    except OSError as error:
        logger.warning("%s cannot be written, it will be made again next time: %s", path, error)
        return False
    return True
