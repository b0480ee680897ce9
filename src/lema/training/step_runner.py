"""One step and what came of it: a loss, or the reason why there was none.

It knows an engine's step and why its numbers may not count; it knows nothing of what follows from that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ..errors import NonFiniteError
from .engine import Batch, Report, TrainingEngine
from .journal import Journal
from .metrics import Counts
from .state import TrainerState


@dataclass(frozen=True)
class Outcome:
    """What came of a step."""

    counts: Counts
    loss: float | None = None
    """Mean over its targets; None: it does not count."""
    skipped: str | None = None
    """Why parameters were not updated; None: they were."""
    grad_norm: float | None = None
    report: Report | None = None


class StepRunner:
    """Makes steps.

    Args:
        timeline: the file that the step `recorded` is written to.
        abandonable: a block in which a signal may leave the step, and which all ranks leave together.
    """

    def __init__(
        self, engine: TrainingEngine, state: TrainerState, journal: Journal, timeline: Path,
        abandonable: Callable[[], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self._engine, self._state, self._journal = engine, state, journal
        self._timeline, self._abandonable = timeline, abandonable
        self.recorded = 0

    def make(self, batch: Batch, number: int) -> Outcome:
        """Make the step of this number; steps whose numbers are not finite are counted in the state."""
        counts = Counts.of(batch, self._engine.coordinator)
        if counts.targets == 0:
            return Outcome(counts, skipped="all its rows were dropped")
        with self._abandonable():
            try:
                loss = self._recorded(batch, number)
            except NonFiniteError as error:
                self._state.nonfinite_in_a_row += 1
                return Outcome(counts, skipped=str(error))
        report = self._engine.last_step
        if report is not None and report.skipped:  # usual in fp16, until the scale has come down
            scale = self._engine.loss_scale
            self._state.nonfinite_in_a_row += scale < 1
            return Outcome(counts, skipped=f"fp16 overflow, the loss scale is {scale:g} now", report=report)
        return Outcome(counts, loss, None, None if report is None else report.grad_norm, report)

    def _recorded(self, batch: Batch, number: int) -> float | None:
        if number != self.recorded:
            return self._step(batch)
        loss = None
        try:
            with self._engine.record_step(self._timeline, number):
                loss = self._step(batch)
        except OSError as error:
            if loss is None:
                raise
            self._journal.event(number, "not_written", f"{self._timeline.name} could not be written: {error}")
        return loss

    def _step(self, batch: Batch) -> float | None:
        return self._engine.train_step(batch.inputs)[1] if batch.targets else self._engine.join_step()
