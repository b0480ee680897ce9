"""The end of the last whole step: what a run goes back to when the next one is left in the middle.

It knows a run's counters, the place in its data, random states and the engine's updates; it knows nothing of why one
goes back.
"""

from __future__ import annotations

import copy
from typing import Any

from .engine import Machine, Restorable, Stream
from .state import TrainerState


class LastGood:
    """A place to go back to, which lasts until parameters change."""

    def __init__(self, machine: Machine, stream: Stream, state: TrainerState) -> None:
        self._machine, self._stream, self._state = machine, stream, state
        self._kept: tuple[TrainerState, dict[str, Any], Restorable] | None = None
        self._updates = 0

    def remember(self) -> None:
        """This is a good place to go back to."""
        state = copy.copy(self._state)
        state.log_history = list(self._state.log_history)
        self._kept = state, self._stream.state_dict(), self._machine.random_state()
        self._updates = self._machine.updates

    def forget(self) -> None:
        """There is no place to go back to any more."""
        self._kept = None

    def go_back(self) -> None:
        """Put counters, data and random states there, after the step under way was left, and drop what it made."""
        assert self._kept is not None
        self._machine.drop_step()
        state, cursor, random = self._kept
        for name, value in vars(state).items():
            setattr(self._state, name, value)
        self._stream.load_state_dict(cursor)
        random.restore()

    @property
    def is_past(self) -> bool:
        """Whether parameters are no longer those of that step."""
        return self._machine.torn or self._machine.updates != self._updates

    @property
    def holds(self) -> bool:
        """Whether there is such a place, and the parameters are still those of it."""
        return self._kept is not None and not self.is_past
