"""What came of a run. It knows words and numbers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FINISHED, INTERRUPTED = "finished", "interrupted"


@dataclass(frozen=True)
class TrainResult:
    """What came of a run."""

    status: str
    """finished, or interrupted (and to be resumed)."""
    global_step: int
    adapter: Path | None
    """`final/`, or the checkpoint to go on from; None: nothing was saved."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """See `TrainerState.summary`."""
