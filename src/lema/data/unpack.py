"""Compressed files and standard input as plain files, which rows can be read from by their place.

It knows formats of compression and where copies are kept; it knows nothing of rows. A copy lies in the cache folder
under the name of what it was made from, and is made anew when that changed; without a cache folder it lies in the
temporary directory and goes when the process ends. Standard input is always such a temporary copy.
"""

from __future__ import annotations

import atexit
import bz2
import gzip
import importlib
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, InputError
from ..libraries import how_to_install
from ..storage.atomic import replaced_file
from ..storage.cache import cache_folder, digest

_CHUNK = 8 << 20
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def _open_zstd(file: IO[bytes]) -> Any:
    """Python's own from 3.14 on; before, that of pyarrow, which `datasets` brings."""
    try:
        zstd = importlib.import_module("compression.zstd")
    except ImportError:
        try:
            import pyarrow
        except ImportError as error:
            raise ConfigError(
                f"reading zstd takes the pyarrow library, which comes with datasets: {how_to_install('datasets')}"
            ) from error
        return pyarrow.CompressedInputStream(file, "zstd")
    return zstd.open(file)


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd, ".zstd": _open_zstd,
}  # fmt: skip
COMPRESSED = tuple(_OPENERS)


def unpacked(path: Path) -> Path:
    """A plain copy of a compressed file.

    Raises:
        InputError: it cannot be read, is damaged, or there is no room for the copy.
        ConfigError: a library is missing that its compression takes.
    """
    try:
        stat = path.stat()
        made_of = digest(path.resolve(), stat.st_size, stat.st_mtime_ns)
        folder = cache_folder()
        if folder is None:
            return _written(path, _temporary(), path.suffix.lower())
        copy = folder / "unpacked" / digest(path.resolve()) / f"{made_of}{Path(path.stem).suffix.lower()}"
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(copy) as aside:
                _written(path, aside, path.suffix.lower())
            for old in copy.parent.iterdir():  # what it was before it changed; others may be writing theirs
                if old != copy and old.suffix != ".tmp":
                    old.unlink(missing_ok=True)
        return copy
    except OSError as error:
        raise InputError(f"{path} cannot be unpacked: {error.strerror or error}") from error


def standard_input() -> Path:
    """All of standard input as a file that goes when the process ends, unpacked where it is compressed.

    Raises:
        InputError: nothing is piped in, or it is damaged.
    """
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or sys.stdin.isatty():
        raise InputError("the file is -, and nothing is piped in: as in `zcat rows.jsonl.gz | lema data check -`")
    copy = _temporary()
    with open(copy, "wb") as file:
        shutil.copyfileobj(stream, file, _CHUNK)
    with open(copy, "rb") as file:
        start = file.read(8)
    kind = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    return copy if kind is None else _written(copy, _temporary(), kind, "standard input")


def _written(path: Path, target: Path, kind: str, name: str | None = None) -> Path:
    """Unpack one file into another, piece by piece."""
    try:
        with open(path, "rb") as packed, _OPENERS[kind](packed) as plain, open(target, "wb") as file:
            shutil.copyfileobj(plain, file, _CHUNK)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
        raise InputError(f"{name or path} is damaged, or not compressed as its name says: {error}") from error
    except OSError as error:
        raise InputError(f"{name or path} cannot be unpacked: {error.strerror or error}") from error
    return target


def _temporary() -> Path:
    handle, name = tempfile.mkstemp(prefix="lema-rows-")
    os.close(handle)
    atexit.register(Path(name).unlink, missing_ok=True)
    return Path(name)
