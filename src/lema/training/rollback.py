"""The end of the last whole step: what a run goes back to when the next one is left in the middle.

It knows a run's counters, the place in its data, random states and the engine's updates; it knows nothing of why one
goes back.
"""

from __future__ import annotations

import copy
from typing import Any

from .engine import Restorable, Stream, TrainingEngine
from .state import TrainerState


class Rollback:
    """A place to go back to, which lasts until parameters change.

    An update counts itself before it changes anything, so that one under way and one that is over both show.
    """

    def __init__(self, engine: TrainingEngine, stream: Stream, state: TrainerState) -> None:
        self._engine, self._stream, self._state = engine, stream, state
        self._updates = engine.trainables.updates
        self._kept: tuple[TrainerState, dict[str, Any], Restorable] | None = None

    def remember(self) -> None:
        """This is a good place to go back to."""
        state = copy.copy(self._state)
        state.log_history = list(self._state.log_history)
        self._kept = state, self._stream.state_dict(), self._engine.random_state()
        self._updates = self._engine.trainables.updates

    def forget(self) -> None:
        """There is no place to go back to any more."""
        self._kept = None

    def go_back(self) -> bool:
        """Put counters, data and random states there, after the step under way was left, and drop what it made; False
        if there is no such place, or the parameters are no longer those of it."""
        if self._kept is None or self.is_past:
            return False
        self._engine.drop_step()
        state, cursor, random = self._kept
        vars(self._state).update(vars(state))
        self._stream.load_state_dict(cursor)
        random.restore()
        return True

    @property
    def is_past(self) -> bool:
        """Whether parameters are no longer those of that step."""
        return self._engine.trainables.updates != self._updates
