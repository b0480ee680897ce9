"""What code of strangers may take: so many seconds, and so much memory.

It knows threads and limits of a process; it knows nothing of what runs under them.

Mechanics. A chat template is a program, and may loop or grow for ever. Time is watched by a thread that raises an
error in the one that renders, at its next byte code; memory by a limit of the process on its address space, so that
one operation that asks for gigabytes fails before it takes them. Both are taken back whatever happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_PAGES = Path("/proc/self/statm")
_LOOKS, _IDLE = 0.05, 5.0  # seconds
_one_at_a_time = threading.Lock()


class OutOfTimeError(Exception):
    """The time is over."""


class _Watch:
    """One thread that looks at who runs, and goes when nothing has run for a while: starting one costs too much."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._runs: tuple[int, float] | None = None
        self.over = False

    def begin(self, seconds: float) -> None:
        with self.lock:
            self._runs, self.over = (threading.get_ident(), time.monotonic() + seconds), False
            if self._thread is None or not self._thread.is_alive():  # gone, or left behind by a fork
                self._thread = threading.Thread(target=self._look, name="template-watch", daemon=True)
                self._thread.start()

    def end(self) -> None:
        with self.lock:
            self._runs = None

    def _look(self) -> None:
        idle_since = time.monotonic()
        while True:
            time.sleep(_LOOKS)
            with self.lock:
                now = time.monotonic()
                if self._runs is not None:
                    idle_since, (runner, deadline) = now, self._runs
                    if now > deadline:
                        self._runs, self.over = None, True
                        _raise_in(runner, OutOfTimeError)
                elif now - idle_since > _IDLE:
                    self._thread = None
                    return


_watch = _Watch()


@contextlib.contextmanager
def limited(seconds: float, more_bytes: int) -> Iterator[None]:
    """Run a block for so many seconds, with so many bytes more of address space than there are now.

    Raises:
        OutOfTimeError: it ran longer.
        MemoryError: it asked for more.
    """
    with _one_at_a_time, _ceiling(more_bytes):
        try:
            _watch.begin(seconds)
            yield
        finally:
            _watch.end()
        if _watch.over:  # in its very last moment: what has not come yet must not come later
            _raise_in(threading.get_ident(), None)
            raise OutOfTimeError


@contextlib.contextmanager
def _ceiling(more_bytes: int) -> Iterator[None]:
    if not _PAGES.exists():  # no Linux: time is watched there, and memory is not
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = int(_PAGES.read_text().split()[0]) * resource.getpagesize() + more_bytes
    if soft != resource.RLIM_INFINITY:
        ceiling = min(ceiling, soft)
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Let an error come up in a thread at its next byte code; None: take back one that has not come yet."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
