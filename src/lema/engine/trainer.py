"""`LemaTrainer`: a training step, and what has to be counted and kept between steps.

It knows batches, gradients and the optimizer; it knows nothing of text, files of weights or slots.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..config import LemaConfig
from ..errors import ConfigError, NonFiniteError
from ..machine.heap import give_back_idle_heap
from ..models.base import LemaModelAdapter
from ..models.lora import LoRAManager
from ..storage.index import GlobalBinaryIndex
from ..streaming.memory import TripleBufferManager
from ..streaming.randomness import RandomState
from ..streaming.timeline import COMPUTE
from .assembly import assemble_memory
from .attach import Attachment, attach, check_router_loss
from .device_memory import explained
from .diagnosis import first_bad_activation, first_bad_gradient
from .host_optimizer import HostMasters
from .inputs import Batch, join_batches, make_batch
from .loss.head_loss import HeadLoss
from .loss.positions import LossResult
from .loss_scale import LossScale
from .optimizer import check_optimizer, default_optimizer
from .resumable import Resumable
from .step_report import StepReport, report_of
from .turns import check_gradients_on, in_turn
from .update import GradientBuffer, step_optimizer
from .window import Window

if TYPE_CHECKING:
    from ..training.result import TrainResult

__all__ = ["LemaTrainer", "StepReport"]

logger = logging.getLogger(__name__)


class LemaTrainer(Resumable):
    """Trains LoRA adapters of a model whose layers are streamed.

    Args:
        config: settings.
        model_adapter: the model.
        gbi: its weights.
        lora_manager: its adapters; None: made from the config, or none where `use_lora` is off.
        optimizer: over the adapters' parameters; None: AdamW with the config's learning rate.
        memory_manager: owner of the slots; None: made from the config.
        streamer: layers already installed on this memory; None: installed here.

    Raises:
        ConfigError: an optimizer that holds none of the adapters' parameters.
    """

    def __init__(
        self,
        config: LemaConfig,
        model_adapter: LemaModelAdapter,
        gbi: GlobalBinaryIndex,
        lora_manager: LoRAManager | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        memory_manager: TripleBufferManager | None = None,
        *,
        streamer: Attachment | None = None,
    ) -> None:
        self.config = config
        self.adapter = model_adapter
        self.gbi = gbi
        self.device = torch.device(config.device)
        self.memory = memory_manager or assemble_memory(config, model_adapter, gbi)
        self.lm = model_adapter.causal_lm()
        self.lora_manager = lora_manager
        if lora_manager is not None:
            check_router_loss(self.lm, config.leave_out_router_loss)
            lora_manager.attach(model_adapter)
        peft_model = lora_manager.peft_model if lora_manager is not None else None
        self.streamer = streamer or attach(self.lm, self.memory, config.micro_batch_size, peft_model)
        self.layers = model_adapter.get_layer_metadata()
        self.owns_optimizer = optimizer is None
        """Whether the optimizer was made here, so that its settings are the config's."""
        self.optimizer = optimizer or default_optimizer(lora_manager, config.learning_rate)
        self.global_step = 0
        self.last_step: StepReport | None = None
        self.driven = False
        """Whether a training loop decides when to save."""
        self.updating = False
        """Whether parameters are being changed, and are not of any step."""
        self.updates = 0
        """Times the optimizer has been asked to step."""
        self.loss = HeadLoss(self.lm, self.memory, config)
        self._gradients = GradientBuffer(self.device)
        self._base_weights: dict[str, Any] | None = None
        self._state_settled = False
        self._warned = False
        self._window = Window(config.gradient_accumulation_steps)
        hosted = lora_manager is not None and self.memory.plan.optimizer == "host"
        self._loss_scale = LossScale(enabled=config.dtype == "float16" and lora_manager is not None)
        if lora_manager is not None:
            check_optimizer(self.optimizer, lora_manager.get_trainable_parameters())
        self._masters: HostMasters | None = None
        if hosted and lora_manager is not None:
            trained = lora_manager.get_trainable_parameters()
            self._masters = HostMasters(trained, self.optimizer, self.memory.backend)

    # -- one step --------------------------------------------------------------------------------

    @in_turn
    def train_step(
        self,
        inputs: torch.Tensor | Mapping[str, Any],
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor | None, float | None]:
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
        if batch.targets is None:
            return self._forward(batch), None
        parameters = self._parameters()
        check_gradients_on(parameters)
        denominator = self._window.expect(batch.num_targets)
        self._place_gradients(parameters)
        with self._accounted(batch) as outcome:
            self.model.train()
            random_state = RandomState.now(self.device)
            hidden = self.lm.hidden_states(**batch.model_inputs)
            self._turn()
            result = self.loss(hidden, batch.targets, denominator, scale=self.loss_scale, with_logits=return_logits)
            self._turn()
            hidden.backward(result.gradient)
            del hidden
            loss = self._checked_loss(result, batch, random_state)
            self._window.add(batch.num_targets)
            if self._window.full:
                self._turn()
                with self.memory.timeline.span(COMPUTE, "optimizer"):
                    outcome.update(self._update())
                self._turn()
        self._save_if_due(outcome)
        return result.logits, loss * denominator / batch.num_targets

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
            _, loss = self.train_step(joined)
        assert loss is not None
        return loss

    @in_turn
    def eval_step(
        self,
        inputs: torch.Tensor | Mapping[str, Any],
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor | None, float | None]:
        """Like `train_step` without dropout, gradients or updates."""
        batch = self.batch(inputs, labels, attention_mask, position_ids)
        if batch.targets is None:
            return self._forward(batch), None
        result = self.evaluate(batch, batch.num_targets, with_logits=return_logits)
        return result.logits, result.loss

    @in_turn
    def finish(self) -> bool:
        """Step the optimizer on a window that is not full yet; False if there is nothing to step on."""
        if self._window.calls == 0:
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
        if plan.predicted and batch.num_tokens > plan.batch * plan.seq and not self._warned:
            self._warned = True
            logger.warning(
                "a batch of %d tokens is larger than the %d x %d that the memory plan is for: it may not stay within "
                "the budget; set batch_size and max_seq_length to what train_step is given",
                batch.num_tokens, plan.batch, plan.seq,
            )  # fmt: skip
        self.streamer.prepare(len(batch.model_inputs["input_ids"]))
        return batch

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Logits of a batch without targets."""
        with self._evaluating(batch):
            return self.lm.logits(self.lm.hidden_states(**batch.model_inputs))

    @in_turn
    def evaluate(self, batch: Batch, denominator: float, **wanted: bool) -> LossResult:
        """Loss summed over a batch's targets and divided by `denominator`; see `HeadLoss` for what may be wanted."""
        assert batch.targets is not None
        with self._evaluating(batch):
            hidden = self.lm.hidden_states(**batch.model_inputs)
            return self.loss(hidden, batch.targets, denominator, with_gradient=False, **wanted)

    @contextlib.contextmanager
    def _evaluating(self, batch: Batch) -> Iterator[None]:
        training = self.model.training
        with self._accounted(batch, training=False), torch.no_grad():
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(training)

    def _update(self) -> dict[str, Any]:
        """Settle, check and clip the gradients, then step the optimizer and empty them."""
        if self._masters is not None:
            self._masters.arrive()
        parameters = self._parameters() if self._masters is None else self._masters.masters
        self._window.settle(parameters)
        self.updating = True
        self.updates += 1
        norm = step_optimizer(self.optimizer, self._loss_scale, parameters, self.config.max_grad_norm)
        overflow = not math.isfinite(norm)
        if overflow and not self._loss_scale.enabled:
            self.updating = False
            self.updates -= 1
            self._refuse_gradients(norm)
        self._settle_state()
        self.discard_window()
        if overflow:
            logger.warning("fp16 overflow: update skipped, loss scale now %g", self.loss_scale)
        else:
            self.global_step += 1
        self.updating = False
        return {"grad_norm": norm, "skipped": overflow}

    def _refuse_gradients(self, norm: float) -> NoReturn:
        if self._masters is not None:
            self._masters.hand_back_gradients()
        place = first_bad_gradient(self.streamer.layers)
        self.discard_window()
        raise NonFiniteError(
            f"the gradient norm is {norm} at step {self.global_step + 1}, first seen in the backward at {place}; "
            "the optimizer was not stepped. Lower the learning rate or look at the data of this step"
        )

    def discard_window(self) -> None:
        """Forget the gradients accumulated since the last optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._masters is not None:
            self._masters.drop_gradients()
        self._window.reset()

    def drop_step(self) -> None:
        """Stop every reader and forget the gradients of a step that cannot be gone on with."""
        self.memory.abort()
        self.discard_window()

    @contextlib.contextmanager
    def whole_windows(self) -> Iterator[None]:
        """Inside the block each `train_step` is one optimizer step, and when to save is somebody else's decision.

        Layers then run `batch_size` rows at once, where neither the plan nor a setting cuts finer.
        """
        with self._whole_window(self.config.batch_size if self._window.length > 1 else None):
            self.driven = True
            yield

    @contextlib.contextmanager
    def _whole_window(self, rows_at_once: int | None) -> Iterator[None]:
        """Inside the block one call is a window, and layers run so many rows at once unless something cuts finer."""
        if self._window.calls:
            raise ConfigError(f"{self._window.calls} calls of train_step are waiting for their step: call finish()")
        batching = self.streamer.batching
        before = batching.micro_batch_size, self._window.length, self.driven
        batching.micro_batch_size = min(filter(None, (rows_at_once, before[0])), default=None)
        self._window.length = 1
        try:
            yield
        finally:
            batching.micro_batch_size, self._window.length, self.driven = before

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies the loss with; 1 elsewhere."""
        return self._loss_scale.factor

    # -- training --------------------------------------------------------------------------------

    def train(self, dataset: Any, eval_dataset: Any = None, **options: Any) -> TrainResult:
        """Train as `lema train` does: schedule, evaluation, samples, checkpoints, metrics, exact resume.

        Args:
            dataset: a path (see `DataConfig.train_file`), what `lema.data.load_data` returns, or any iterable of
                batches that has `steps_per_epoch`, `state_dict()` and `load_state_dict()`.
            eval_dataset: batches to evaluate on, where `dataset` has none of its own.
            **options: those of `lema.run.training.train_with`: training, data, tokenizer, callbacks, resume, plain.
        """
        from ..run.training import train_with

        return train_with(self, dataset, eval_dataset, **options)

    # -- parts of a step ---------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model whose mode is switched: PEFT's around transformers', or the bare one."""
        return self.lora_manager.peft_model if self.lora_manager is not None else self.lm.module

    def _turn(self) -> None:
        """Between two phases of a step, memory of the last one goes back to the system where memory is short."""
        if self.memory.plan.predicted:
            self.streamer.heap.relieve()
        elif self.memory.streamed:
            give_back_idle_heap()

    def _place_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Let gradients of a new window gather in one buffer of their own, off the heap that layers use."""
        if self._masters is not None or self._window.calls or any(p.grad is not None for p in parameters):
            return
        self._gradients.place(parameters)

    def _save_if_due(self, outcome: dict[str, Any]) -> None:
        if self.driven:
            return
        stepped = "grad_norm" in outcome and not outcome["skipped"]
        if stepped and self.config.save_steps > 0 and self.global_step % self.config.save_steps == 0:
            self.save_checkpoint(Path(self.config.output_dir) / f"checkpoint-{self.global_step}")

    def _checked_loss(self, result: LossResult, batch: Batch, random_state: RandomState) -> float:
        """The loss, read only now that the backward is enqueued, before anything of it can reach the optimizer."""
        loss = result.loss
        if math.isfinite(loss):
            return loss
        place = first_bad_activation(self.lm, batch, random_state)
        self.discard_window()
        raise NonFiniteError(
            f"the loss is {loss} at step {self.global_step + 1}, first seen in the output of {place}; the "
            "optimizer was not stepped. Lower the learning rate, or use bfloat16 or float32 if this is float16"
        )

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

    def _parameters(self) -> list[nn.Parameter]:
        if self.lora_manager is None:
            raise ConfigError("labels were given but nothing can be trained: use_lora is off; use eval_step")
        return self.lora_manager.get_trainable_parameters()
