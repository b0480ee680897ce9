"""Files and folders that appear whole or not at all: made under a hidden name beside their place, then renamed.

A rename alone keeps a killed process from leaving half a file. What must outlive a power cut as well is flushed to the
disk before it, and the folder that holds the name after it. Nothing else in the package calls fsync.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .complete import MARKER, write_marker

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def name_aside(target: Path) -> Path:
    """A free hidden name beside the target, `.NAME.NUMBER.tmp`, for what shall take its place."""
    return target.with_name(f".{target.name}.{os.getpid()}{secrets.randbelow(10**6):06}.tmp")


def flush(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk.

    Raises:
        OSError: it is gone, or the disk refused.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(fresh: Path, target: Path) -> None:
    """Flush a file, or a folder with all that is in it, and give it its name; it outlives a power cut.

    A file takes the place of another one, a folder that of an empty one at most.

    Raises:
        OSError: the disk refused, or the target is a folder with something in it.
    """
    _flush_all(fresh)
    os.rename(fresh, target)
    flush(target.absolute().parent)


@contextlib.contextmanager
def replaced_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """A name to write under; the file there takes the path's place when the block ends well, and goes if it fails.

    Args:
        durable: it outlives a power cut too, for the price of two flushes.
    """
    aside = name_aside(path)
    try:
        yield aside
        if durable:
            put_in_place(aside, path)
        else:
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a text in UTF-8 as `replaced_file` does."""
    with replaced_file(path, durable) as aside:
        aside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which gets the target's name when the block ends well; else it goes.

    Raises:
        OSError: at the end, the target is there and not empty.
    """
    with _beside(target.absolute()) as fresh:
        yield fresh
        put_in_place(fresh, target)


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the target's place when the block ends well, with a marker of completeness.

    The marker is written last, when everything else is on the disk; then the two change places in one step where the
    system can do that, else by two renames. If the block fails, the target stays as it was.
    """
    target = target.absolute()
    with _beside(target) as fresh:
        yield fresh
        _flush_all(fresh)
        write_marker(fresh)
        flush(fresh / MARKER)
        flush(fresh)
        _swap(fresh, target)
        flush(target.parent)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    fresh = name_aside(target)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _flush_all(path: Path) -> None:
    for inside in sorted(path.rglob("*")) if path.is_dir() else ():
        flush(inside)
    flush(path)


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
