"""Where each row of a file is, found in one pass that also hashes the file, and kept for the next time.

It knows bytes and line ends, and how an index is kept; it knows nothing of JSON, CSV or of what rows mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat as modes
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from ..errors import InputError
from ..storage.cache import cache_folder, digest, write_whole

logger = logging.getLogger(__name__)

_VERSION = 2
_CHUNK = 8 << 20
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)
_ANNOUNCED_BYTES = 256 << 20


_KINDS = {
    modes.S_IFIFO: "a named pipe", modes.S_IFCHR: "a device", modes.S_IFBLK: "a device", modes.S_IFSOCK: "a socket",
}  # fmt: skip


@dataclass(frozen=True)
class RowIndex:
    """Rows of a file, in order."""

    spans: np.ndarray
    """int64 `[rows, 3]`: offset and length in bytes, and the line, from 1, on which the row begins; mapped from the
    cache where there is one."""
    sha256: str
    """Of the whole file, hexadecimal."""
    num_bytes: int
    mtime_ns: int

    def line(self, row: int) -> int:
        """The line a row begins on, counted from 1."""
        return int(self.spans[row, 2])


Scan = Callable[[Path, os.stat_result], RowIndex]
"""Finds the rows of a file of one kind."""


def check_regular(path: Path) -> None:
    """Refuse what is no file with an end: a named pipe, a device, a socket.

    Raises:
        InputError: says what it is.
        OSError: there is nothing, or it may not be looked at.
    """
    kind = modes.S_IFMT(path.stat().st_mode)
    if kind not in (modes.S_IFREG, modes.S_IFDIR):
        raise InputError(
            f"{path} is {_KINDS.get(kind, 'no file')}, and rows are read more than once: write them to a file, or pipe "
            "them in and give - as the file"
        )


def row_index(path: Path, scan: Scan | None = None, kind: str = "lines") -> RowIndex:
    """The index of a file, from the cache where path, size and time of change are as they were.

    Args:
        scan: finds the rows; None: each line that is not blank is one.
        kind: a word that tells the scan's indices from others of the same file.

    Raises:
        InputError: the file cannot be read, is no regular file, or changed meanwhile.
    """
    try:
        check_regular(path)
        stat = path.stat()
        folder = cache_folder()
        name = f"{kind}-{digest(_VERSION, path.resolve())}"
        if folder is not None and (found := _load(folder / name, stat)) is not None:
            return found
        if stat.st_size >= _ANNOUNCED_BYTES:
            logger.info("indexing the rows of %s (%.1f GB), once", path, stat.st_size / 1e9)
        started = time.perf_counter()
        made = (scan or _scan)(path, stat)
        logger.debug("indexed %s in %.1f s", path, time.perf_counter() - started)
        after = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise InputError(f"{path} changed while it was read: wait until it is written, then start again")
    if folder is None:
        return made
    return _store(folder / name, made, path) or made


def _scan(path: Path, stat: os.stat_result) -> RowIndex:
    """One pass: a second thread hashes what this one searches for line ends."""
    spans: list[np.ndarray] = []
    lines, start, blank = 0, 0, True  # before the line being read; where it begins, whether only whitespace was seen
    position = 0
    for chunk in _hashed(path, hasher := hashlib.sha256()):
        data = np.frombuffer(chunk, dtype=np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        if ends.size == 0:
            blank = blank and not chunk.strip()
        else:
            starts = np.concatenate(([start], ends[:-1] + position + 1))
            lengths = ends + position - starts
            empty = _blank_lines(chunk, data, ends, blank)
            numbers = np.arange(lines + 1, lines + 1 + ends.size)
            spans.append(np.stack((starts, lengths, numbers), axis=1).astype(np.int64)[~empty])
            lines += ends.size
            start = position + int(ends[-1]) + 1
            blank = not chunk[int(ends[-1]) + 1 :].strip()
        position += len(chunk)
    if not blank:
        spans.append(np.array([[start, position - start, lines + 1]], dtype=np.int64))
    none = np.empty((0, 3), dtype=np.int64)
    return RowIndex(np.concatenate([none, *spans]), hasher.hexdigest(), position, stat.st_mtime_ns)


def _blank_lines(chunk: bytes, data: np.ndarray, ends: np.ndarray, first_blank: bool) -> np.ndarray:
    """Which of the lines that end in this chunk are blank; the first one may have begun before it."""
    begins = np.concatenate(([0], ends[:-1] + 1))
    maybe = np.isin(data[begins], _WHITESPACE)  # an empty line begins with its own line end
    for i in np.flatnonzero(maybe):
        maybe[i] = not chunk[begins[i] : ends[i]].strip()
    maybe[0] = first_blank and not chunk[: ends[0]].strip()
    return maybe


def _hashed(path: Path, hasher: Any) -> Iterator[bytes]:
    """The file's chunks, each also handed to a thread that hashes them in order."""
    waiting: Queue[bytes | None] = Queue(maxsize=2)

    def work() -> None:
        while (chunk := waiting.get()) is not None:
            hasher.update(chunk)

    thread = threading.Thread(target=work, name="lema-hash", daemon=True)
    thread.start()
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                waiting.put(chunk)
                yield chunk
    finally:
        waiting.put(None)
        thread.join()


def _load(base: Path, stat: os.stat_result) -> RowIndex | None:
    """The stored index, if it is of this very file; anything odd about it means it is made again."""
    try:
        facts = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
        if (facts["bytes"], facts["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            return None
        spans = np.load(base.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        if spans.shape != (facts["rows"], 3) or spans.dtype != np.int64:
            return None
        if facts["rows"] and int(spans[-1, :2].sum()) > stat.st_size:
            return None
        return RowIndex(spans, str(facts["sha256"]), stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _store(base: Path, index: RowIndex, path: Path) -> RowIndex | None:
    """Keep an index, the description last; returned mapped from its file, so that its memory can be given back."""
    facts = {
        "file": str(path), "bytes": index.num_bytes, "mtime_ns": index.mtime_ns, "rows": len(index.spans),
        "sha256": index.sha256,
    }  # fmt: skip
    base.with_suffix(".json").unlink(missing_ok=True)
    if not write_whole(base.with_suffix(".npy"), lambda file: np.save(file, index.spans, allow_pickle=False)):
        return None
    if not write_whole(base.with_suffix(".json"), lambda file: file.write(json.dumps(facts).encode())):
        return None
    return _load(base, path.stat())
