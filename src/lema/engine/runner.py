"""What trains a trainer over data: given by the rooms above, which the engine does not import."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..training.result import TrainResult

_given: list[Callable[..., TrainResult]] = []


def train_by(function: Callable[..., TrainResult]) -> None:
    """From now on `LemaTrainer.train` calls this with the trainer and what it was given itself."""
    _given[:] = [function]


def train(trainer: Any, *data: Any, **options: Any) -> TrainResult:
    """Call what was given."""
    return _given[0](trainer, *data, **options)
