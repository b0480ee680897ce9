"""How long a run is and how its learning rate goes: pure functions of the step.

It knows step numbers; it knows nothing of optimizers. The curves are transformers' own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError
from ..typed import LARGEST
from .config import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run."""

    kind: str
    max_steps: int
    warmup_steps: int
    steps_per_epoch: int

    @classmethod
    def of(cls, config: TrainingConfig, steps_per_epoch: int) -> Schedule:
        """The schedule of a config for data of this many steps an epoch; `ConfigError` if that is none."""
        if steps_per_epoch < 1:
            raise ConfigError("the training data has no rows, so there is no step to make; look at train_file")
        if config.max_steps <= 0 and not config.num_train_epochs * steps_per_epoch <= LARGEST:
            raise ConfigError(f"num_train_epochs={config.num_train_epochs:g} is too large a number")
        steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
        warmup = config.warmup_steps
        return cls(
            kind=config.lr_scheduler_type,
            max_steps=steps,
            warmup_steps=int(warmup) if warmup >= 1 else math.ceil(steps * warmup),
            steps_per_epoch=steps_per_epoch,
        )

    def factor(self, step: int) -> float:
        """What the learning rate is times, in step `step` (from 1)."""
        done = step - 1
        if done < self.warmup_steps:
            return done / max(1, self.warmup_steps)
        if self.kind == "constant":
            return 1.0
        progress = (done - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        if self.kind == "linear":
            return max(0.0, 1.0 - progress)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch is over after this step."""
        return step % self.steps_per_epoch == 0

    def to_dict(self, step: int) -> dict[str, float | int | str]:
        """JSON-ready, for a checkpoint at this step."""
        return {
            "lr_scheduler_type": self.kind, "max_steps": self.max_steps, "warmup_steps": self.warmup_steps,
            "last_step": step, "next_factor": self.factor(step + 1),
        }  # fmt: skip
