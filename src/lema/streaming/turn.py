"""Whose turn it is: one thread at a time drives a model, whose slots and schedule are shared.

It knows threads; it knows nothing of what they do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..errors import StreamingError

__all__ = ["Turn"]


class Turn:
    """Held by the thread that is at work, which may take it again; nobody waits for it.

    To wait would be no help: two threads that train one model take turns at its gradients as well.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._what = ""

    def take(self, what: str) -> None:
        """Begin; every `take` needs its `give`.

        Raises:
            StreamingError: another thread is at work, which is not disturbed by it.
        """
        me = threading.get_ident()
        if self._owner != me:
            if not self._lock.acquire(blocking=False):
                raise StreamingError(
                    f"{what} was called while another thread is in {self._what or 'a step'} of the same model, whose "
                    "weights in memory are those of a few layers at a time. Call both from one thread, or hold a lock "
                    "of your own around them"
                )
            self._owner, self._what = me, what
        self._depth += 1

    def give(self) -> None:
        """End; without effect in a thread that does not hold the turn."""
        if self._owner != threading.get_ident():
            return
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()

    @property
    def held(self) -> bool:
        """Whether this thread holds it."""
        return self._owner == threading.get_ident()

    @contextlib.contextmanager
    def taken(self, what: str) -> Iterator[None]:
        """Hold it inside the block; raises as `take` does."""
        self.take(what)
        depth = self._depth
        try:
            yield
        finally:
            self._depth = depth  # a forward that Ctrl-C ended has not given its own back
            self.give()
