"""`LemaTrainer`: a training step, and what has to be counted and kept between steps.

It knows batches, gradients and the optimizer; it knows nothing of text, files of weights or slots.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..compat.trainer import OriginalTrainer
from ..config import LemaConfig
from ..coordinator import Coordinator
from ..errors import ConfigError
from ..models.base import LemaModelAdapter
from ..models.lora import LoRAManager
from ..models.trained import Trained
from ..storage.index import GlobalBinaryIndex
from ..streaming.randomness import RandomState
from ..streaming.timeline import COMPUTE, Recording
from ..streaming.weight_store import WeightStore
from .attach import Attachment, attach_parts, check_router_loss
from .device_memory import explained
from .diagnosis import bad_gradient, bad_loss, first_bad_activation
from .generation import generate
from .inputs import Batch, join_batches, make_batch
from .loss.head_loss import HeadLoss
from .loss.positions import LossResult
from .numerics import numerics
from .resume_state import ResumeState
from .step_report import StepReport, report_of
from .trainables import Trainables
from .trial import check_training
from .turns import check_gradients_on, evaluating, in_turn
from .window import Window

__all__ = ["LemaTrainer", "StepReport"]

logger = logging.getLogger(__name__)


class LemaTrainer(OriginalTrainer):
    """Trains LoRA adapters of a model whose layers are streamed.

    Args:
        config: settings.
        model_adapter: the model.
        gbi: its weights.
        lora_manager: its adapters; None: nothing is trained.
        optimizer: over the adapters' parameters; None: AdamW with the config's learning rate.
        memory_manager: where its weights lie; None: laid out here, by a plan for the config.
        attachment: the model attached to its weights already; None: attached here.
        coordinator: the run's other processes; None: there are none.

    Raises:
        ConfigError: an optimizer that holds none of the adapters' parameters.
    """

    def __init__(
        self, config: LemaConfig, model_adapter: LemaModelAdapter, gbi: GlobalBinaryIndex,
        lora_manager: LoRAManager | None = None, optimizer: torch.optim.Optimizer | None = None,
        memory_manager: WeightStore | None = None, *, attachment: Attachment | None = None,
        coordinator: Coordinator | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.adapter = model_adapter
        self.gbi = gbi
        self.device = torch.device(config.device)
        self.attachment = attachment or attach_parts(config, model_adapter, gbi, memory_manager)
        self.memory = self.attachment.memory
        self.coordinator = coordinator or Coordinator()
        self.lm = model_adapter.causal_lm()
        self.lora_manager = lora_manager
        if lora_manager is not None:
            check_router_loss(self.lm, config.leave_out_router_loss)
        trained = lora_manager or Trained()
        self.model = trained.attach(model_adapter)
        """The model whose mode is switched: PEFT's around transformers', or the bare one."""
        if lora_manager is not None:
            self.attachment.guard(self.model)
            check_training(self.attachment.fault)
        self.trainables = Trainables(trained, optimizer, config, self.memory)
        self.optimizer = self.trainables.optimizer
        self.window = Window(config.gradient_accumulation_steps)
        self.loss = HeadLoss(self.lm, self.memory)
        self.label_smoothing = 0.0
        """Share of a target's weight that training spreads over the vocabulary; what is evaluated is the plain loss."""
        self.last_step: StepReport | None = None
        self._resume_state = ResumeState(config, self.lm, gbi, self.trainables, self.window)
        self._steps = 0
        self._external: Callable[[], int] | None = None
        self._warned = False

    # -- one step --------------------------------------------------------------------------------

    @in_turn
    def train_step(
        self, inputs: torch.Tensor | Mapping[str, Any], labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor | None, float | None]:  # fmt: skip
        """Forward, backward and, at the end of an accumulation window, one optimizer step.

        Args:
            inputs: ids `[batch, seq]`, or a mapping with `input_ids` and any of the rest.
            labels: `[batch, seq]`, unshifted, -100 where nothing is learned; None: a forward pass only.
            attention_mask, position_ids: `[batch, seq]`.
            return_logits: with labels, also return `[batch, seq, vocab]`, which is large.

        Returns:
            (logits or None, this call's mean loss over its targets or None).

        Raises:
            InputError: nothing can be learned from this batch.
            NonFiniteError: loss or gradient is NaN or infinite; the optimizer was not touched.
            DeviceMemoryError: the step does not fit into the device's memory; the next one may.
            StreamingError: another thread is in a step. UnsupportedError: autograd is off.
        """
        batch = self.batch(inputs, labels, attention_mask, position_ids)
        return self._learn(batch, return_logits) if batch.targets is not None else (self._forward(batch), None)

    @in_turn
    def join_step(self) -> float:
        """Take part in a call of `train_step` that only other ranks have targets for; returns its mean loss."""
        return self._learn(None)[1]

    def _learn(self, batch: Batch | None, with_logits: bool = False) -> tuple[torch.Tensor | None, float]:
        parameters = self.trainables.require("labels were given but nothing can be trained", "; use eval_step")
        check_gradients_on(parameters)
        targets = self.coordinator.totals("targets", [batch.num_targets if batch is not None else 0])[0]
        denominator = self.window.expect(targets)
        self.trainables.place_gradients(parameters)
        with self._accounted(batch) as outcome:
            random_state = RandomState.now(self.device)
            result = None if batch is None else self._backward(batch, denominator, with_logits)
            loss = self._checked_loss(result, batch, random_state)
            self.window.add(targets)
            if self.window.full:
                self._trim()
                with self.memory.timeline.span(COMPUTE, "optimizer"):
                    outcome.update(self._update())
                self._trim()
        self._save_if_due(outcome)
        return None if result is None else result.logits, loss * denominator / targets

    def _backward(self, batch: Batch, denominator: float, with_logits: bool) -> LossResult:
        """Forward, loss and backward: adds to the gradients."""
        assert batch.targets is not None
        self.model.train()
        hidden = self.lm.hidden_states(**batch.model_inputs)
        self._trim()
        result = self.loss(
            hidden, batch.targets, denominator, scale=self.loss_scale, smoothing=self.label_smoothing,
            with_logits=with_logits,
        )  # fmt: skip
        self._trim()
        result.backward(hidden)
        return result

    @in_turn
    def train_window(self, batches: Sequence[Mapping[str, Any]]) -> float:
        """One optimizer step on all these batches: as so many calls of `train_step`, but weights are read once.

        Args:
            batches: mappings with `input_ids`, `labels` and any of the rest, the same in each; see `train_step`. Layers
                run no more rows at once than the largest has. With a budget `batch_size` is all rows of a window.

        Returns:
            The mean loss over all targets. Raises what `train_step` does, and `ConfigError` while calls of it wait.
        """
        joined, most_rows = join_batches(batches)
        with self._whole_window(most_rows):
            if (loss := self.train_step(joined)[1]) is not None:
                return loss
        raise ConfigError("the batches have no labels, so there is nothing to train on")

    @in_turn
    def eval_step(
        self, inputs: torch.Tensor | Mapping[str, Any], labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor | None, float | None]:  # fmt: skip
        """Like `train_step` without dropout, gradients or updates."""
        batch = self.batch(inputs, labels, attention_mask, position_ids)
        if batch.targets is None:
            return self._forward(batch), None
        result = self._evaluated(batch, batch.targets, batch.num_targets, with_logits=return_logits)
        return result.logits, result.loss

    @in_turn
    def evaluate(self, inputs: Mapping[str, Any]) -> tuple[float, int, int]:
        """Loss summed over a batch's targets, how many there are, and how many of them the model has right: where the
        logit is the largest; of equal ones the first in the vocabulary counts. `ConfigError` without labels."""
        batch = self.batch(inputs)
        if batch.targets is None:
            raise ConfigError("the batch has no labels, so there is nothing to evaluate")
        result = self._evaluated(batch, batch.targets, 1.0, with_accuracy=True)
        assert result.correct is not None  # it was asked for
        return result.loss, batch.num_targets, result.correct

    @in_turn
    def finish(self) -> bool:
        """Step the optimizer on a window that is not full yet; False if there is nothing to step on."""
        if self.window.calls == 0:
            return False
        with self._accounted(None) as outcome:
            outcome.update(self._update())
        self._save_if_due(outcome)
        return True

    @in_turn
    def batch(self, inputs: torch.Tensor | Mapping[str, Any], *rest: torch.Tensor | None) -> Batch:
        """A batch checked, where it is computed, in a form the layers can cut."""
        batch = make_batch(self.lm, inputs, *rest).on(self.device)
        plan = self.memory.plan
        if (plan.ram_budget or plan.vram_budget) and batch.num_tokens > plan.batch * plan.seq and not self._warned:
            self._warned = True
            logger.warning(
                "a batch of %d tokens is larger than the %d x %d that the memory plan is for: it may not stay within "
                "the budget; set batch_size and max_seq_length to what train_step is given",
                batch.num_tokens, plan.batch, plan.seq,
            )  # fmt: skip
        self.attachment.prepare()
        return batch

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Logits of a batch without targets."""
        with self._accounted(batch, training=False), evaluating(self.model):
            return self.lm.logits(self.lm.hidden_states(**batch.model_inputs))

    def _evaluated(self, batch: Batch, targets: torch.Tensor, denominator: float, **wanted: bool) -> LossResult:
        """Loss summed over the targets and divided by `denominator`; see `HeadLoss` for what may be wanted."""
        with self._accounted(batch, training=False), evaluating(self.model):
            hidden = self.lm.hidden_states(**batch.model_inputs)
            return self.loss(hidden, targets, denominator, with_gradient=False, **wanted)

    def _update(self) -> dict[str, Any]:
        """Step the optimizer on the window's gradients and empty them, or say where they are not finite."""
        norm = self.trainables.update(self.window, self.config.max_grad_norm, self.coordinator)
        overflow = not math.isfinite(norm)
        if overflow and not self.trainables.loss_scale.enabled:
            error = bad_gradient(norm, self.global_step + 1, self.attachment.layers)
            self.discard_window()
            raise error
        self.discard_window()
        if overflow:
            logger.warning("fp16 overflow: update skipped, loss scale now %g", self.loss_scale)
        else:
            self._steps += 1
        return {"grad_norm": norm, "skipped": overflow}

    def discard_window(self) -> None:
        """Forget the gradients accumulated since the last optimizer step."""
        self.trainables.drop_gradients()
        self.window.reset()

    def drop_step(self) -> None:
        """Stop every reader and forget the gradients of a step that cannot be gone on with."""
        self.memory.abort()
        self.discard_window()

    @contextlib.contextmanager
    def external_loop(self, steps: Callable[[], int] | None = None) -> Iterator[None]:
        """Inside the block each `train_step` is one optimizer step, and a loop decides when to save.

        Layers then run no more rows at once than `batch_size`, or than the plan is for.

        Args:
            steps: how many the loop has counted; None: they are counted here.
        """
        rows = max(self.config.batch_size, self.memory.plan.batch)
        with self._whole_window(rows if self.window.length > 1 else None):
            self._external = steps or (lambda: self._steps)
            try:
                yield
            finally:
                self._steps, self._external = self._external() or self._steps, None

    @contextlib.contextmanager
    def _whole_window(self, rows_at_once: int | None) -> Iterator[None]:
        """Inside the block one call is a window, and layers run so many rows at once unless something cuts finer."""
        batching = self.attachment.batching
        before = batching.micro_batch_size
        with self.window.whole():
            batching.micro_batch_size = min(filter(None, (rows_at_once, before)), default=None)
            try:
                yield
            finally:
                batching.micro_batch_size = before

    # -- state -------------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Optimizer steps so far; in an external loop, as many as that has counted."""
        return self._steps if self._external is None else self._external()

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies the loss with; 1 elsewhere."""
        return self.trainables.loss_scale.factor

    def random_state(self) -> RandomState:
        """Where the generators are now."""
        return RandomState.now(self.device)

    def numerics(self) -> dict[str, Any]:
        """What the last bits of numbers depend on, beyond settings."""
        return numerics(self.config, self.memory.plan, self.attachment.batching.micro_batch_size)

    def record_step(self, path: str | os.PathLike[str], number: int) -> contextlib.AbstractContextManager[Recording]:
        """Write a timeline of what happens in the block."""
        return self.memory.timeline.recorded_to(path, number)

    @in_turn
    def save_checkpoint(
        self, directory: str | os.PathLike[str], trainer_state: Mapping[str, Any] | None = None,
        more: Callable[[Path], None] | None = None,
    ) -> Path:  # fmt: skip
        """Write adapter, config, optimizer, counters and random state, replacing the directory in one step.

        Args:
            trainer_state: of a training loop, JSON-ready.
            more: writes further files into the directory it is given.
        """
        return self._resume_state.save(directory, self.global_step, trainer_state, more)

    @in_turn
    def load_checkpoint(self, directory: str | os.PathLike[str]) -> dict[str, Any]:
        """Go on from a checkpoint as if never stopped; returns the `trainer_state` it was saved with.

        Raises:
            CheckpointError: incomplete, damaged, or of another base, adapter or optimizer.
        """
        trainer_state = self._resume_state.load(directory)
        self._steps = trainer_state["lema"]["global_step"]
        return trainer_state

    def load_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Take the adapter of a checkpoint and nothing else."""
        self.trainables.load_parameters(directory)

    def generate(self, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
        """Ids `[batch, seq + new]`; see `lema.engine.generation.generate`."""
        return generate(self.lm, self.model, self.memory, inputs, **kwargs)

    # -- parts of a step ---------------------------------------------------------------------------

    def _trim(self) -> None:
        """Between two phases of a step, memory of the last one goes back to the system where memory is short."""
        self.attachment.trim()

    def _save_if_due(self, outcome: dict[str, Any]) -> None:
        stepped = "grad_norm" in outcome and not outcome["skipped"] and self._external is None
        every = self.config.save_steps if stepped and self.coordinator.is_writer else 0
        if every > 0 and self.global_step % every == 0:
            self.save_checkpoint(Path(self.config.output_dir) / f"checkpoint-{self.global_step}")

    def _checked_loss(self, result: LossResult | None, batch: Batch | None, random_state: RandomState) -> float:
        """The ranks' loss, read only now that the backward is enqueued, before it can reach the optimizer."""
        own = 0.0 if result is None else result.loss
        loss = self.coordinator.totals("loss", [own])[0]
        if math.isfinite(loss):
            return loss
        seen = None if batch is None or math.isfinite(own) else first_bad_activation(self.lm, batch, random_state)
        error = bad_loss(loss, self.global_step + 1, self.coordinator.agree("bad loss", seen))
        self.discard_window()
        raise error

    @contextlib.contextmanager
    def _accounted(self, batch: Batch | None, training: bool = True) -> Iterator[dict[str, Any]]:
        """Fill `last_step`; if the block is left by an error or Ctrl-C, stop every reader and, in training, drop the
        window, whose gradients may be half there."""
        started, before = time.perf_counter(), self.memory.stats
        outcome: dict[str, Any] = {}
        try:
            with explained(self.config.device, self.memory.plan):
                yield outcome
        except BaseException:
            self.drop_step() if training else self.memory.abort()
            raise
        targets = batch.num_targets if batch is not None else 0
        used = self.memory.stats - before
        self.last_step = report_of(used, time.perf_counter() - started, self.config.device, targets, outcome)
