"""A trainer as the training loop drives it.

It knows what the loop asks of an engine (`lema.training.engine.Machine`); it knows nothing of schedules or files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine.generation import generate
from ..engine.optimizer import scale_learning_rate, set_adamw
from ..engine.step_report import StepReport
from ..engine.trainer import LemaTrainer
from ..errors import ConfigError
from ..machine.device import device_name
from ..streaming.randomness import RandomState
from ..streaming.timeline import Recording


class TrainerMachine:
    """A `LemaTrainer` inside its `whole_windows`; `ConfigError` if there is no adapter to train."""

    def __init__(self, trainer: LemaTrainer) -> None:
        if trainer.lora_manager is None:
            raise ConfigError("nothing can be trained: use_lora is off")
        self.trainer = trainer

    @property
    def model(self) -> torch.nn.Module:
        """The model trained."""
        return self.trainer.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimizer."""
        return self.trainer.optimizer

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self.trainer.device)

    @property
    def last_step(self) -> StepReport:
        """What the last step did."""
        assert self.trainer.last_step is not None
        return self.trainer.last_step

    @property
    def torn(self) -> bool:
        """Whether parameters are in the middle of an update, and so must not be saved."""
        return self.trainer.updating

    @property
    def updates(self) -> int:
        """Updates so far: a step that was left after its update cannot be taken back."""
        return self.trainer.updates

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies the loss with; 1 elsewhere."""
        return self.trainer.loss_scale

    def set_optimizer(self, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """Settings of the optimizer the trainer made; one that was given keeps its own."""
        if self.trainer.owns_optimizer:
            set_adamw(self.optimizer, self.trainer.config.learning_rate, betas, eps, weight_decay)

    def set_label_smoothing(self, factor: float) -> None:
        """Share of a target's weight that training spreads over the vocabulary."""
        self.trainer.loss.smoothing = factor

    def set_learning_rate(self, factor: float) -> float:
        """Set every group's learning rate to its first one times a factor; returns the first group's."""
        return scale_learning_rate(self.optimizer, factor)

    def train_step(self, inputs: Mapping[str, Any], number: int) -> float:
        """One optimizer step; the mean loss over its targets. `number` is what errors call the step."""
        self.trainer.global_step = number - 1
        _, loss = self.trainer.train_step(inputs)
        assert loss is not None
        self.trainer.global_step = number
        return loss

    def drop_step(self) -> None:
        """Drop loads and gradients of a step that was left anywhere, even while it was cleared up."""
        self.trainer.drop_step()

    def evaluate(self, inputs: Mapping[str, Any]) -> tuple[float, int, int]:
        """See `evaluate_batch`."""
        return evaluate_batch(self.trainer, inputs)

    def generate(self, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
        """Ids `[batch, seq + new]`."""
        trainer = self.trainer
        return generate(trainer.lm, trainer.model, trainer.memory, inputs, **kwargs)

    def random_state(self) -> RandomState:
        """Where the generators are now."""
        return RandomState.now(self.trainer.device)

    def save(
        self, directory: Path, trainer_state: Mapping[str, Any], more: Callable[[Path], None] | None = None
    ) -> None:
        """Write a checkpoint; see `LemaTrainer.save_checkpoint`."""
        self.trainer.global_step = trainer_state["global_step"]
        self.trainer.save_checkpoint(directory, trainer_state, more)

    def load(self, directory: Path) -> dict[str, Any]:
        """Read a checkpoint; see `LemaTrainer.load_checkpoint`."""
        return self.trainer.load_checkpoint(directory)

    def load_adapter(self, directory: Path) -> None:
        """Take the adapter of a checkpoint and nothing else."""
        self.trainer.load_adapter(directory)

    def record_step(self, path: str | os.PathLike[str], number: int) -> contextlib.AbstractContextManager[Recording]:
        """Write a timeline of what happens in the block."""
        return self.trainer.memory.timeline.recorded_to(path, number)

    def numerics(self) -> dict[str, Any]:
        """What numbers depend on beyond settings: sums are cut by it, so other values differ in the last bits."""
        trainer, plan = self.trainer, self.trainer.memory.plan
        found: dict[str, Any] = {
            "torch": torch.__version__,
            "device": device_name(trainer.config.device),
            "threads": torch.get_num_threads(),
            "micro_batch_size": trainer.streamer.batching.micro_batch_size,
            "loss_chunk_size": trainer.config.loss_chunk_size if plan.loss_by_batch else plan.loss_chunk_size,
        }
        if plan.predicted:
            found |= {
                "head_chunked": plan.head == "chunked",
                "head_rows": plan.head_rows, "optimizer_place": plan.optimizer,
            }  # fmt: skip
        return found


def evaluate_batch(trainer: LemaTrainer, inputs: Mapping[str, Any]) -> tuple[float, int, int]:
    """Loss summed over a batch's targets, how many there are, and how many of them the model has right.

    A target is right where its logit is the largest; of equal ones the first in the vocabulary counts.

    Raises:
        ConfigError: the batch has no labels.
    """
    batch = trainer.batch(inputs)
    if batch.targets is None:
        raise ConfigError("the batch has no labels, so there is nothing to evaluate")
    result = trainer.evaluate(batch, 1.0, with_accuracy=True)
    assert result.correct is not None
    return result.loss, batch.num_targets, result.correct
