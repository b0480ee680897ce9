"""Whether a checkpoint is of this run, and what differs if it is not.

It knows settings and what numbers depend on; data and base weights are compared by those who own them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..typed import shortened
from .run_config import affects_numerics

_NOW_THERE = {"leave_out_router_loss": False, "on_bad_row": "error", "quantize": None}
"""Settings that a run may have been saved without, and what they were then."""
_LENGTH = ("max_steps", "num_train_epochs")


def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that numbers depend on, with the rows of a step for the two whose product they are."""
    rows = settings.get("batch_size", 1) * settings.get("gradient_accumulation_steps", 1)
    found = {name: value for name, value in settings.items() if affects_numerics(name) and name not in _LENGTH}
    return {**found, "batch_size x gradient_accumulation_steps": rows}


def check_resume(checkpoint: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """`CheckpointError` unless a checkpoint's settings and those of now give the same numbers; says which differ."""
    before, now = compared({**_NOW_THERE, **saved}), compared({**_NOW_THERE, **settings})
    differ = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if differ:
        listed = ", ".join(
            f"{name} was {shortened(before.get(name))} and is {shortened(now.get(name))}" for name in differ
        )
        raise CheckpointError(
            f"{checkpoint} cannot be gone on from: {listed}. Give the settings it was trained with, or start a new "
            "run in another output_dir. Length (max_steps, num_train_epochs), paths, places and budgets, when it is "
            "logged, evaluated and saved may differ, and how the same rows are cut (batch_size, "
            "gradient_accumulation_steps, micro_batch_size)"
        )


def other_length(saved: Mapping[str, Any], settings: Mapping[str, Any], before: int, now: int) -> str | None:
    """What another length of the run means for its learning rate; None where it means nothing.

    Args:
        before, now: steps in all.
    """
    warmup = settings.get("warmup_steps", 0)
    begins_alike = settings.get("lr_scheduler_type") == "constant" and (warmup == 0 or warmup >= 1)
    if before == now or begins_alike:
        return None
    return (
        f"the run has {now} steps now and had {before}: the learning rate follows the {settings['lr_scheduler_type']} "
        f"schedule of {now} steps from here on, so this is not the run that {now} steps from the start would have been"
    )


def numerics_changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs of what the last bits depend on; None if nothing does."""
    differ = [name for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    return ", ".join(f"{name} was {saved.get(name)} and is {now.get(name)}" for name in differ) or None
