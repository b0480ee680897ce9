"""Whether a checkpoint is of this run, and what differs if it is not.

It knows settings and what numbers depend on; data and base weights are compared by those who own them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..typed import shortened

# Settings that may change between stop and resume: none of them changes what is computed. Paths are not compared,
# since what lies there is; budgets and places decide where numbers are computed, not which.
_FREE = {
    "model_name_or_path", "gbi_path", "train_file", "eval_file", "chat_template", "output_dir", "device", "strategy",
    "ram_buffer_size", "vram_buffer_size", "ram_budget", "vram_budget", "ram_layers", "device_layers",
    "keep_activations", "boundaries", "optimizer_place", "gradient_checkpointing", "save_steps", "num_slots",
    "num_readers", "prefetch_depth", "max_nonfinite_steps", "logging_steps", "report_to", "run_name", "eval_strategy",
    "eval_steps", "load_best_model_at_end", "early_stopping_patience",
    "sample_prompts", "sample_max_new_tokens", "save_total_limit", "on_save_error", "max_dropped", "max_train_hours",
}  # fmt: skip
_NOW_CALLED = {"loss_chunk_size": (None, "auto"), "leave_out_router_loss": (None, False)}
"""What was the default once, and is it no longer, or what there was no setting for, beside what is: a run that set
neither goes on."""
_LENGTH = ("max_steps", "num_train_epochs")


def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that numbers depend on."""
    return {name: value for name, value in settings.items() if name not in _FREE}


def check_resume(checkpoint: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """`CheckpointError` unless a checkpoint's settings and those of now give the same numbers; says which differ."""
    before, now = compared(saved), compared(settings)
    differ = [
        name
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and (before.get(name), now.get(name)) != _NOW_CALLED.get(name)
    ]
    warmup = now.get("warmup_steps", 0)
    if now.get("lr_scheduler_type") == "constant" and (warmup == 0 or warmup >= 1):
        differ = [name for name in differ if name not in _LENGTH]  # a longer run begins like a shorter one
    if differ:
        listed = ", ".join(
            f"{name} was {shortened(before.get(name))} and is {shortened(now.get(name))}" for name in differ
        )
        raise CheckpointError(
            f"{checkpoint} cannot be gone on from: {listed}. Give the settings it was trained with, or start a new "
            "run in another output_dir"
        )


def numerics_changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs of what the last bits depend on; None if nothing does."""
    differ = [name for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    return ", ".join(f"{name} was {saved.get(name)} and is {now.get(name)}" for name in differ) or None
