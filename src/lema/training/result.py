"""What came of a run. It knows words and numbers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FINISHED, INTERRUPTED, STOPPED = "finished", "interrupted", "stopped"


@dataclass(frozen=True)
class TrainResult:
    """What came of a run."""

    status: str
    """finished; or, to be resumed, interrupted by a signal or stopped by `max_train_hours`."""
    global_step: int
    """Optimizer steps taken, those before a resume included."""
    adapter: Path | None
    """`final/`, or the checkpoint to go on from; None: nothing was saved."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """See `TrainerState.summary`."""
