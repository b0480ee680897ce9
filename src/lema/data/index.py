"""Where each line of a JSONL file begins, found in one pass that also hashes the file, and kept for the next time.

It knows bytes and line ends; it knows nothing of JSON or of what rows mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from ..cache import cache_folder, digest, write_whole
from ..errors import InputError

logger = logging.getLogger(__name__)

_VERSION = 1
_CHUNK = 8 << 20
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)
_ANNOUNCED_BYTES = 256 << 20


@dataclass(frozen=True)
class LineIndex:
    """Lines that are not blank, in order."""

    spans: np.ndarray
    """int64 `[rows, 2]`: offset and length in bytes, without the line end; mapped from the cache where there is one."""
    blanks: np.ndarray
    """int64, for each blank line the row that comes after it."""
    sha256: str
    """Of the whole file, hexadecimal."""
    num_bytes: int
    mtime_ns: int

    def line(self, row: int) -> int:
        """The line a row is on, counted from 1."""
        return row + 1 + int(np.searchsorted(self.blanks, row, side="right"))


def line_index(path: Path) -> LineIndex:
    """The index of a file, from the cache where path, size and time of change are as they were.

    Raises:
        InputError: the file cannot be read, or changed meanwhile.
    """
    try:
        stat = path.stat()
        folder = cache_folder()
        name = f"lines-{digest(_VERSION, path.resolve())}"
        if folder is not None and (found := _load(folder / name, stat)) is not None:
            return found
        if stat.st_size >= _ANNOUNCED_BYTES:
            logger.info("indexing the lines of %s (%.1f GB), once", path, stat.st_size / 1e9)
        started = time.perf_counter()
        made = _scan(path, stat)
        logger.debug("indexed %s in %.1f s", path, time.perf_counter() - started)
        after = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise InputError(f"{path} changed while it was read: wait until it is written, then start again")
    if folder is None:
        return made
    return _store(folder / name, made, path) or made


def _scan(path: Path, stat: os.stat_result) -> LineIndex:
    """One pass: a second thread hashes what this one searches for line ends."""
    spans: list[np.ndarray] = []
    blanks: list[np.ndarray] = []
    rows, start, blank = 0, 0, True  # of the line being read: where it begins, whether only whitespace was seen
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
            full = ~empty
            spans.append(np.stack((starts[full], lengths[full]), axis=1).astype(np.int64))
            blanks.append((rows + np.cumsum(full))[empty].astype(np.int64))
            rows += int(full.sum())
            start = position + int(ends[-1]) + 1
            blank = not chunk[int(ends[-1]) + 1 :].strip()
        position += len(chunk)
    if not blank:
        spans.append(np.array([[start, position - start]], dtype=np.int64))
    none = np.empty((0, 2), dtype=np.int64)
    return LineIndex(
        np.concatenate([none, *spans]), np.concatenate([none[:, 0], *blanks]), hasher.hexdigest(), position,
        stat.st_mtime_ns,
    )  # fmt: skip


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


def _load(base: Path, stat: os.stat_result) -> LineIndex | None:
    """The stored index, if it is of this very file; anything odd about it means it is made again."""
    try:
        facts = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
        if (facts["bytes"], facts["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            return None
        spans = np.load(base.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        blanks = np.array(facts["blanks"], dtype=np.int64)
        if spans.shape != (facts["rows"], 2) or spans.dtype != np.int64:
            return None
        if facts["rows"] and int(spans[-1].sum()) > stat.st_size:
            return None
        return LineIndex(spans, blanks, str(facts["sha256"]), stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _store(base: Path, index: LineIndex, path: Path) -> LineIndex | None:
    """Keep an index, the description last; returned mapped from its file, so that its memory can be given back."""
    facts = {
        "file": str(path), "bytes": index.num_bytes, "mtime_ns": index.mtime_ns, "rows": len(index.spans),
        "sha256": index.sha256, "blanks": index.blanks.tolist(),
    }  # fmt: skip
    base.with_suffix(".json").unlink(missing_ok=True)
    if not write_whole(base.with_suffix(".npy"), lambda file: np.save(file, index.spans, allow_pickle=False)):
        return None
    if not write_whole(base.with_suffix(".json"), lambda file: file.write(json.dumps(facts).encode())):
        return None
    return _load(base, path.stat())
