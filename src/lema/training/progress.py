"""What follows from a run's numbers: when something is due, which evaluation was the best, when enough is enough.

It knows counters and settings; it knows nothing of engines, data or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import TrainingConfig
from .schedule import Schedule
from .state import TrainerState

_EVAL_STEPS = 500


class Progress:
    """Decisions of a run, from its settings and its state.

    Args:
        has_evaluation: whether there is data to evaluate on, or prompts to answer.
    """

    def __init__(
        self, config: TrainingConfig, save_steps: int, schedule: Schedule, state: TrainerState, has_evaluation: bool
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.state = state
        self.save_steps = save_steps
        strategy = config.eval_strategy
        if strategy == "auto":
            strategy = "steps" if config.eval_steps else "epoch"
        self.eval_strategy = strategy if has_evaluation else "no"
        self.eval_steps = config.eval_steps or _EVAL_STEPS

    @property
    def at_end(self) -> bool:
        """Whether all steps are done."""
        return self.state.global_step >= self.schedule.max_steps

    @property
    def log_due(self) -> bool:
        """Whether the log gets an entry after this step."""
        step = self.state.global_step
        return self.state.logged_step != step and (step % self.config.logging_steps == 0 or self.at_end)

    @property
    def evaluation_due(self) -> bool:
        """Whether to evaluate after this step."""
        step = self.state.global_step
        if self.eval_strategy == "no" or step == 0 or self.state.evaluated_step == step:
            return False
        regular = self.schedule.ends_epoch(step) if self.eval_strategy == "epoch" else step % self.eval_steps == 0
        return regular or self.at_end

    @property
    def save_due(self) -> bool:
        """Whether to save after this step."""
        if self.config.save_strategy == "epoch":
            return self.schedule.ends_epoch(self.state.global_step)
        return (
            self.config.save_strategy == "steps"
            and self.save_steps > 0
            and self.state.global_step % self.save_steps == 0
        )

    def count_loss(self, loss: float, targets: int) -> None:
        """A step's mean loss, towards the next entry of the log."""
        self.state.loss_sum += loss * targets
        self.state.loss_targets += targets
        self.state.nonfinite_in_a_row = 0

    def entry(self, learning_rate: float, grad_norm: float | None) -> dict[str, Any]:
        """The log's entry of the steps since the last one."""
        state = self.state
        mean = state.loss_sum / state.loss_targets if state.loss_targets else None
        state.loss_sum, state.loss_targets, state.logged_step = 0.0, 0, state.global_step
        logs = {"loss": mean, "grad_norm": grad_norm, "learning_rate": learning_rate, "epoch": state.epoch}
        state.log_history.append({**logs, "step": state.global_step})
        return dict(state.log_history[-1])

    def take_evaluation(self, metrics: Mapping[str, Any]) -> bool:
        """Keep an evaluation; whether it is the best so far."""
        state = self.state
        state.evaluated_step = state.global_step
        state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
        value = float(metrics[self.config.metric_for_best_model])
        before = state.best_metric
        up = self.config.higher_is_better
        better = math.isfinite(value) and (before is None or (value > before if up else value < before))
        if better:
            state.best_metric, state.best_global_step = value, state.global_step
            state.evaluations_without_better = 0
        else:
            state.evaluations_without_better += 1
        return better

    @property
    def patience_is_over(self) -> bool:
        """Whether too many evaluations in a row were not better."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.evaluations_without_better >= patience
