"""When a run with a limited time has to stop.

It knows a clock and how long things took so far; it knows nothing of what they are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

_SPARE = 1.25
"""What is to come may take this many times as long as the longest of its kind so far."""
_LAST = 0.01
"""Share of the limit that is kept for the end of the process and for what was never done yet."""


class TimeLimit:
    """Hours a run may take.

    Args:
        hours: None: without limit.
        began: when it began, by `clock`.
        clock: seconds; another one in tests.
    """

    def __init__(self, hours: float | None, began: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.hours = hours
        self._began = began
        self._clock = clock
        self._longest: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Measure what is done in the block, for the next of its kind."""
        started = self._clock()
        try:
            yield
        finally:
            self._longest[kind] = max(self._clock() - started, self._longest.get(kind, 0.0))

    def allows(self, *kinds: str) -> bool:
        """Whether these would be over in time, one after the other; what was never done yet counts as nothing."""
        if self.hours is None:
            return True
        limit = self.hours * 3600
        needed = _LAST * limit + _SPARE * sum(self._longest.get(kind, 0.0) for kind in kinds)
        return self._clock() - self._began + needed < limit
