"""What a run has come to: Hugging Face's `TrainerState` and `TrainerControl`, and what only we keep.

It knows numbers to count and keep; it knows nothing of how they come about.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainerState:
    """Under transformers' names, so that callbacks written for it find what they look for."""

    epoch: float = 0.0
    global_step: int = 0
    """Windows handed to the engine, skipped ones among them."""
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: int = 0
    eval_steps: int = 0
    save_steps: int = 0
    train_batch_size: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)

    nonfinite_steps: int = 0
    """Steps skipped in all."""
    nonfinite_in_a_row: int = 0
    evaluations_without_better: int = 0
    evaluated_step: int = -1
    """Step of the last evaluation."""
    logged_step: int = 0
    """Step of the last entry of the log."""
    loss_sum: float = 0.0
    """Loss summed over the targets since then."""
    loss_targets: int = 0
    train_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: Hugging Face's keys, and under `lema` ours."""
        values = dataclasses.asdict(self)
        return {**{k: v for k, v in values.items() if k not in _OURS}, "lema": {k: values[k] for k in _OURS}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainerState:
        """The state `to_dict` wrote; what else is there is left alone."""
        known = {f.name for f in dataclasses.fields(cls)}
        merged = {**values, **values.get("lema", {})}
        return cls(**{name: value for name, value in merged.items() if name in known and name != "global_step"},
                   global_step=values["global_step"])  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """`train_loss` of the log's last entry, `train_seconds`, `nonfinite_steps`, and the last evaluation."""
        losses = [entry["loss"] for entry in self.log_history if "loss" in entry]
        evaluations = [entry for entry in self.log_history if "eval_loss" in entry]
        return {
            "train_loss": losses[-1] if losses else None,
            "train_seconds": round(self.train_seconds, 3),
            "nonfinite_steps": self.nonfinite_steps,
            **(evaluations[-1] if evaluations else {}),
        }


_OURS = (
    "nonfinite_steps", "nonfinite_in_a_row", "evaluations_without_better", "evaluated_step", "logged_step", "loss_sum",
    "loss_targets", "train_seconds",
)  # fmt: skip


@dataclass
class TrainerControl:
    """What callbacks may ask for; transformers' names."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def new_step(self) -> None:
        """Forget what was asked for after the last step."""
        self.should_save = self.should_evaluate = self.should_log = False
