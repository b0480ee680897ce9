"""How a run is stopped from outside: SIGINT and SIGTERM.

It knows signals; what is done about them the loop decides.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ..coordinator import StepAbandoned

__all__ = ["StepAbandoned", "StopSignals"]


class StopSignals:
    """Inside the block the first signal is noted; a later one, inside `abandonable` too, abandons what is under way.

    That happens once: what clears up behind it is not to be left in the middle by yet another signal.

    Outside of the main thread, where Python takes no handlers, nothing is changed and nothing noted.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that came."""
        self._may_abandon: Callable[[], bool] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextlib.contextmanager
    def abandonable(self, may_abandon: Callable[[], bool]) -> Iterator[None]:
        """A second signal leaves the block by `StepAbandoned`, if `may_abandon` still says so when it comes."""
        self._may_abandon = may_abandon
        try:
            yield
        finally:
            self._may_abandon = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
            # Not through sys.stderr or a console: what they buffer may be in the middle of a write.
            os.write(2, f"\n{self.requested}: this step is finished and saved; again: it is abandoned\n".encode())
        elif self._may_abandon is not None and self._may_abandon():
            self._may_abandon = None
            raise StepAbandoned
