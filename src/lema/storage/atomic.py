"""Directories that appear whole or not at all.

It knows files and names; it knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .complete import MARKER, write_marker

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the target's place when the block ends well.

    Everything is written beside the target and flushed to disk, the marker last; then the two change
    places in one step where the system can do that, else by two renames. If the block fails, the target
    stays as it was.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield fresh
        for path in sorted(fresh.rglob("*")):
            _flush(path)
        write_marker(fresh)
        _flush(fresh / MARKER)
        os.chmod(fresh, 0o777 & ~_umask())
        _flush(fresh)
        _swap(fresh, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _umask() -> int:
    """The process's; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        aside = fresh.with_suffix(".old")
        os.rename(target, aside)
        os.rename(fresh, target)
        shutil.rmtree(aside)


def _exchange(a: Path, b: Path) -> bool:
    """`renameat2(RENAME_EXCHANGE)` of Linux; False where it is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    result: int = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return result == 0


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
