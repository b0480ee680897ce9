"""The C heap: kept compact, and given back to the system where much of it lies idle.

Done with glibc's allocator; where that is not in use, nothing is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import weakref
from collections.abc import Callable, Iterator

_IDLE_BYTES = 192 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_LARGEST = 2**31 - 1  # mallopt takes an int
_TRIM_BYTES, _MMAPS = 64 << 20, 65536  # where glibc's own adaptation ends, and its default


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _glibc() -> tuple[Callable[[], _MallInfo], Callable[[int], int]] | None:
    try:
        library = ctypes.CDLL(None)
        info, trim = library.mallinfo2, library.malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    info.restype = _MallInfo
    return info, trim


def give_back_idle_heap(least: int = _IDLE_BYTES) -> bool:
    """Return free heap pages to the system if at least so many bytes lie idle; whether that was done.

    For the turns of a step, where what the next phase needs is of another shape than what the last one
    freed: activations of layers, then logits, then activations with their graph.
    """
    functions = _glibc()
    if functions is None or functions[0]().fordblks < least:
        return False
    functions[1](0)
    return True


def resident_bytes() -> int:
    """The process's resident set now, in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


_keepers = 0


def _keep_idle(more: int) -> None:
    """The heap keeps what is freed, large blocks among it, while anybody wants it to; else as glibc adapts itself.

    Args:
        more: how many want it so, beside those before.
    """
    global _keepers
    _keepers += more
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_TRIM_THRESHOLD, _LARGEST if _keepers else _TRIM_BYTES)
    mallopt(_M_MMAP_MAX, 0 if _keepers else _MMAPS)


class HeapGuard:
    """Keeps the holes between activations from growing past what a plan counts on.

    Between two layers little is alive on the heap; if the resident set is then above `limit`, free heap pages
    go back to the system.

    Args:
        limit: bytes of the resident set; None: nothing is done.
        keep_idle: below the limit nothing freed goes back, large blocks among it, so that no page is faulted in
            twice: a kept graph of 3 GB costs a fifth of a step otherwise. This is so for the whole process until
            all guards that want it are closed.
    """

    def __init__(self, limit: int | None, keep_idle: bool = False) -> None:
        self._limit = limit if _glibc() is not None else None
        self.trims = 0
        self._restore: weakref.finalize[[int], HeapGuard] | None = None
        if self._limit is not None:
            _keep_idle(int(keep_idle))
            if keep_idle:
                self._restore = weakref.finalize(self, _keep_idle, -1)

    def close(self) -> None:
        """The process's heap does again what it did; what lies idle on it goes back to the system."""
        if self._restore is not None and self._restore.alive:
            self._restore()
            give_back_idle_heap()

    def relieve(self) -> None:
        """Called between layers."""
        if self._limit is not None and resident_bytes() > self._limit:
            functions = _glibc()
            assert functions is not None
            functions[1](0)
            self.trims += 1


@contextlib.contextmanager
def apart_from_heap() -> Iterator[None]:
    """Inside the block allocations of 128 KiB and more have pages of their own, which go when they are freed.

    For large memory that is given up again while small objects made beside it stay: on the heap those would
    hold wide holes open for the rest of the run, and activations then spread over all of them. Afterwards the
    thresholds are those at which glibc's own adaptation ends.
    """
    if _glibc() is None:
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    mallopt(_M_MMAP_MAX, _MMAPS)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        _keep_idle(0)
