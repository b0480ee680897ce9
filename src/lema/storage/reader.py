"""Reads extents of files into slots with a few threads, past the page cache where the system allows.

The reader knows files, offsets and buffers; it knows nothing of layers, schedules or what is in a slot.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ReadError
from .layout import PAGE, Extent, align_up

logger = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
_STATX_DIOALIGN = 0x2000
_AT_FDCWD = -100


@dataclass(eq=False, slots=True)
class ReadJob:
    """One slot's worth of extents. `done` is called once, from a reader thread, when every piece ended."""

    extents: Sequence[Extent]
    buffer: memoryview
    cancelled: Callable[[], bool]
    done: Callable[[BaseException | None], None]
    begun: Callable[[], None] = lambda: None
    """Called once, from a reader thread, when the first piece is taken up."""
    pieces_left: int = 0
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


@dataclass(frozen=True, slots=True)
class _Piece:
    job: ReadJob
    extent: Extent
    start: int
    end: int

    @property
    def is_first(self) -> bool:
        return self.extent is self.job.extents[0] and self.start == self.extent.offset


class DiskReader:
    """Threads that fill buffers from files.

    Mechanics: an extent is cut into pieces of 8 MiB at page boundaries of the file. With `O_DIRECT` the
    enclosing aligned range of a piece is read straight into the slot, whose layout keeps file offset and
    slot offset congruent; the read may stop early only where the file ends after the bytes that are
    needed. Without it the exact bytes are read and their pages dropped behind. Threads start with the
    first job and end with `stop`; after `stop` the next job starts them again.

    Args:
        num_readers: threads, 1 or more.
        direct: None: use O_DIRECT where the file system grants it; False: never.
    """

    def __init__(self, num_readers: int = 2, direct: bool | None = None) -> None:
        self.bytes_read = 0
        self.read_seconds = 0.0
        self._num_readers = num_readers
        self._direct = direct
        self._queue: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._files: dict[Path, tuple[int, int]] = {}
        self._refused: list[int] = []
        self._lock = threading.Lock()

    def submit(self, job: ReadJob) -> None:
        """Queue a job and return at once. Jobs are read in the order they came."""
        pieces = [piece for extent in job.extents for piece in _cut(job, extent)]
        job.pieces_left = max(len(pieces), 1)
        with self._lock:
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._run, name=f"lema-reader-{i}", daemon=True)
                    for i in range(self._num_readers)
                ]
                for thread in self._threads:
                    thread.start()
        if not pieces:
            pieces = [_Piece(job, Extent(Path(), 0, 0, 0, ()), 0, 0)]
        for piece in pieces:
            self._queue.put(piece)

    def stop(self) -> None:
        """End the threads after what is queued, and close the files. The reader can be used again."""
        with self._lock:
            threads, self._threads = self._threads, []
            for _ in threads:
                self._queue.put(None)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._lock:
            descriptors = [*self._refused, *(descriptor for descriptor, _ in self._files.values())]
            self._files, self._refused = {}, []
        for descriptor in descriptors:
            os.close(descriptor)

    def _run(self) -> None:
        piece = self._queue.get()
        while piece is not None:
            self._work(piece)
            del piece  # what the job reports to must not be kept alive by a thread that waits
            piece = self._queue.get()

    def _work(self, piece: _Piece) -> None:
        job = piece.job
        error: BaseException | None = None
        if piece.end > piece.start and job.error is None and not job.cancelled():
            if piece.is_first:
                job.begun()
            try:
                self._read(piece)
            except ReadError as caught:
                error = caught
        with job.lock:
            job.error = job.error or error
            job.pieces_left -= 1
            last = job.pieces_left == 0
        if last:
            job.done(job.error)

    def _open(self, path: Path) -> tuple[int, int]:
        """Descriptor and alignment of a file; alignment 0 means buffered reads."""
        with self._lock:
            if path not in self._files:
                self._files[path] = _open_direct(path) if self._direct is not False else (_open_buffered(path), 0)
            return self._files[path]

    def _give_up_direct(self, path: Path) -> None:
        """Some file systems open files for direct reads and then refuse the reads."""
        with self._lock:
            if self._files[path][1]:
                logger.info("%s: direct reads are refused, reading through the page cache", path)
                self._refused.append(self._files[path][0])  # another thread may be reading through it now
                self._files[path] = _open_buffered(path), 0

    def _read(self, piece: _Piece) -> None:
        position = piece.start
        alignment = 0
        started = time.perf_counter()
        try:
            descriptor, alignment = self._open(piece.extent.file)
            start, end = piece.start, piece.end
            if alignment:
                start, end = start - start % alignment, align_up(end, alignment)
            shift = piece.extent.slot_offset - piece.extent.offset
            position = start
            while position < piece.end:
                if piece.job.cancelled():
                    return
                count = os.preadv(descriptor, [piece.job.buffer[position + shift : end + shift]], position)
                position += count
                if position < piece.end and (count == 0 or (alignment and count % alignment)):
                    raise _read_error(piece, position, f"the file ends at byte {position}")
            if not alignment and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
        except ReadError:
            raise
        except OSError as error:
            if error.errno == errno.EINVAL and alignment:
                self._give_up_direct(piece.extent.file)
                self._read(piece)
                return
            raise _read_error(piece, position, str(error)) from error
        with self._lock:
            self.bytes_read += piece.end - piece.start
            self.read_seconds += time.perf_counter() - started


def _cut(job: ReadJob, extent: Extent) -> list[_Piece]:
    end = extent.offset + extent.nbytes
    first = extent.offset - extent.offset % PAGE
    edges = [extent.offset, *range(first + PIECE_BYTES, end, PIECE_BYTES), end]
    return [_Piece(job, extent, a, b) for a, b in itertools.pairwise(edges) if b > a]


def _read_error(piece: _Piece, position: int, reason: str) -> ReadError:
    record = piece.extent.record_at(max(position, piece.extent.offset))
    return ReadError(
        f"reading tensor {record.name!r} ({record.nbytes} bytes at {record.offset}) of {record.file} failed at byte "
        f"{position}: {reason}. Check the disk and that the file was not changed, then run again"
    )


def _open_buffered(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))


def _open_direct(path: Path) -> tuple[int, int]:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return _open_buffered(path), 0
    alignment = direct_alignment(path)
    if alignment == 0 or PAGE % alignment:
        logger.info("%s: no direct reads on this file system, reading through the page cache", path)
        return _open_buffered(path), 0
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag), alignment
    except OSError:
        return _open_buffered(path), 0


class _Statx(ctypes.Structure):
    """`struct statx` of Linux up to the direct-IO fields (linux/stat.h)."""

    _fields_ = [
        ("mask", ctypes.c_uint32),
        ("before", ctypes.c_uint8 * 148),
        ("dio_mem_align", ctypes.c_uint32),
        ("dio_offset_align", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 96),
    ]


def direct_alignment(path: Path) -> int:
    """Bytes to which offset, length and address of a direct read must be aligned; 0 where not granted.

    From `statx(STATX_DIOALIGN)`; kernels older than 6.1 do not say, there a page is assumed.
    """
    result = _Statx()
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except (AttributeError, OSError):
        return PAGE
    if statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, ctypes.byref(result)) != 0:
        return PAGE
    if not result.mask & _STATX_DIOALIGN:
        return PAGE
    return max(result.dio_mem_align, result.dio_offset_align)
