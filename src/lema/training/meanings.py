"""Settings whose names other tools use with another meaning: what was understood, said when somebody uses them.

It knows settings of a run and the habits of other tools; it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run_config import RunConfig


def _micro_batch_size(run: RunConfig) -> str:
    return (
        f"micro_batch_size={run.lema.micro_batch_size}: rows that run at once inside each layer. A step has "
        f"{run.rows_per_step} rows whatever it is, batch_size x gradient_accumulation_steps; what Axolotl and LitGPT "
        "call micro_batch_size is batch_size here"
    )


def _gradient_checkpointing(run: RunConfig) -> str:
    if run.lema.gradient_checkpointing:
        return ""
    return (
        "gradient_checkpointing=false: layers may keep their activations where memory allows it, and are recomputed "
        "elsewhere; keep_activations says how many keep theirs"
    )


def _packing(run: RunConfig) -> str:
    if not run.data.packing:
        return ""
    return (
        f"packing: whole rows lie one after the other in up to {run.lema.max_seq_length} tokens and do not see each "
        "other; none is cut across two packs"
    )


def _max_steps(run: RunConfig) -> str:
    if run.training.max_steps <= 0:
        return ""
    return f"max_steps={run.training.max_steps}: optimizer steps, and num_train_epochs counts for nothing beside it"


def _group_by_length(run: RunConfig) -> str:
    return "group_by_length: by bytes of a row, which are read faster than tokens" if run.data.group_by_length else ""


def _strategy(run: RunConfig) -> str:
    return f"strategy={run.lema.strategy.value}: where base weights are between their uses; devices are not meant"


def _adapter(run: RunConfig) -> str:
    return (
        f"adapter_name_or_path={run.lema.adapter_name_or_path}: its weights are trained further, with the rank, alpha "
        "and targets that it was saved with; lora_rank, lora_alpha and the targets given here count for nothing"
        if run.lema.adapter_name_or_path is not None
        else ""
    )


_MEANINGS: Mapping[str, Callable[[RunConfig], str]] = {
    "adapter_name_or_path": _adapter,
    "gradient_checkpointing": _gradient_checkpointing,
    "group_by_length": _group_by_length,
    "max_steps": _max_steps,
    "micro_batch_size": _micro_batch_size,
    "packing": _packing,
    "strategy": _strategy,
}


def understood(run: RunConfig) -> list[str]:
    """A line for each setting that somebody gave and that other tools mean otherwise."""
    said = [_MEANINGS[name](run) for name in sorted(run.given & _MEANINGS.keys())]
    return [line for line in said if line]
