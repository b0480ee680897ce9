"""`LemaTrainer`: a training step, and what has to be counted and kept between steps.

It knows batches, gradients and the optimizer; it knows nothing of text, files of weights or slots.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import LemaConfig
from ..core.binding import page_aligned, typed_view
from ..core.gbi import GlobalBinaryIndex
from ..core.head import HeadChunks, SlicedHead
from ..core.heap import give_back_idle_heap
from ..core.lora import LoRAManager
from ..core.memory import HEAD, TripleBufferManager
from ..errors import ConfigError, NonFiniteError, UnsupportedError
from ..models.base import LemaModelAdapter
from .assembly import assemble_memory
from .checkpoint import load_checkpoint, save_checkpoint
from .diagnosis import first_bad_activation, first_bad_gradient
from .guards import guard_peft
from .host_optimizer import HostMasters
from .inputs import Batch, make_batch
from .loss import LossResult, compute_loss
from .optimizer import keep_state_apart
from .randomness import RandomState
from .streamer import LayerStreamer
from .vocabulary import check_head, vocabulary_logits, vocabulary_loss
from .window import Window

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the last `train_step` or `eval_step` did."""

    step_seconds: float
    wait_seconds: float
    """Seconds the computation waited for weights."""
    bytes_read: int
    """Bytes of weights read from disk."""
    loads: int
    """Units brought into slots."""
    peak_bytes: int
    """Most memory held so far: device memory on a GPU, else the process's resident set."""
    num_targets: int
    grad_norm: float | None = None
    """Global norm before clipping; None where the optimizer did not step."""
    skipped: bool = False
    """Whether an fp16 overflow skipped the update and lowered the loss scale."""


class LemaTrainer:
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
        streamer: LayerStreamer | None = None,
    ) -> None:
        self.config = config
        self.adapter = model_adapter
        self.gbi = gbi
        self.device = torch.device(config.device)
        self.memory = memory_manager or assemble_memory(config, model_adapter, gbi)
        self.lm = model_adapter.causal_lm()
        self.lora_manager = lora_manager
        if lora_manager is not None:
            lora_manager.attach(model_adapter)
        self.streamer = streamer or LayerStreamer(self.lm, self.memory, config.micro_batch_size)
        if lora_manager is not None and streamer is None:
            guard_peft(lora_manager.peft_model, lora_manager.state_dict)
        self.layers = model_adapter.get_layer_metadata()
        self.optimizer = optimizer or self._default_optimizer()
        self.global_step = 0
        self.last_step: StepReport | None = None
        self._gradients: torch.Tensor | None = None
        self._state_settled = False
        self._warned = False
        self._sliceable: bool | None = None
        self._window = Window(config.gradient_accumulation_steps)
        self._scaler = torch.amp.GradScaler(
            torch.device(config.device).type, enabled=config.dtype == "float16" and lora_manager is not None
        )
        self._check_optimizer()
        self._masters: HostMasters | None = None
        if self.memory.plan is not None and self.memory.plan.optimizer == "host" and lora_manager is not None:
            trained = lora_manager.get_trainable_parameters()
            self._masters = HostMasters(trained, self.optimizer, self.memory.backend)

    # -- one step --------------------------------------------------------------------------------

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
        """
        batch = self._batch(inputs, labels, attention_mask, position_ids)
        if batch.targets is None:
            return self._evaluate(batch, with_logits=True)
        parameters = self._parameters()
        denominator = self._window.expect(batch.num_targets)
        self._place_gradients(parameters)
        with self._accounted(batch) as outcome:
            self.model.train()
            random_state = RandomState.now(self.device)
            hidden = self.lm.hidden_states(**batch.model_inputs)
            self._turn()
            result = self._loss(hidden, batch.targets, denominator, scale=self._loss_scale(), with_logits=return_logits)
            self._check_loss(result, batch, random_state)
            self._turn()
            hidden.backward(result.gradient)
            del hidden
            self._window.add(batch.num_targets)
            if self._window.full:
                self._turn()
                outcome.update(self._update())
                self._turn()
        self._save_if_due(outcome)
        return result.logits, result.loss * denominator / batch.num_targets

    def eval_step(
        self,
        inputs: torch.Tensor | Mapping[str, Any],
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor | None, float | None]:
        """Like `train_step` without dropout, gradients or updates."""
        batch = self._batch(inputs, labels, attention_mask, position_ids)
        return self._evaluate(batch, with_logits=return_logits or batch.targets is None)

    def finish(self) -> bool:
        """Step the optimizer on a window that is not full yet; False if there is nothing to step on."""
        if self._window.calls == 0:
            return False
        with self._accounted(None) as outcome:
            outcome.update(self._update())
        self._save_if_due(outcome)
        return True

    def _batch(self, inputs: torch.Tensor | Mapping[str, Any], *rest: torch.Tensor | None) -> Batch:
        batch = make_batch(self.lm, inputs, *rest).on(self.device)
        plan = self.memory.plan
        if plan is not None and batch.num_tokens > plan.batch * plan.seq and not self._warned:
            self._warned = True
            logger.warning(
                "a batch of %d tokens is larger than the %d x %d that the memory plan is for: it may not stay within "
                "the budget; set batch_size and max_seq_length to what train_step is given",
                batch.num_tokens, plan.batch, plan.seq,
            )  # fmt: skip
        self.streamer.prepare(len(batch.model_inputs["input_ids"]))
        return batch

    def _evaluate(self, batch: Batch, with_logits: bool) -> tuple[torch.Tensor | None, float | None]:
        training = self.model.training
        with self._accounted(batch, training=False), torch.no_grad():
            self.model.eval()
            try:
                hidden = self.lm.hidden_states(**batch.model_inputs)
                if batch.targets is None:
                    return self.lm.logits(hidden), None
                result = self._loss(
                    hidden, batch.targets, batch.num_targets, with_gradient=False, with_logits=with_logits
                )
            finally:
                self.model.train(training)
        return result.logits, result.loss

    def _loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, denominator: float, *, scale: float = 1.0,
        with_gradient: bool = True, with_logits: bool = False,
    ) -> LossResult:  # fmt: skip
        """Head and loss: on all logits at once, or by pieces of positions and vocabulary."""
        chunks: HeadChunks | SlicedHead | None = self.memory.head_chunks
        if chunks is None:
            with self.memory.use(HEAD):
                if self._slices_head():
                    assert self.lm.head is not None
                    weight: Any = self.lm.head.weight
                    chunks = SlicedHead(weight)
                    return self._pieces(hidden, targets, denominator, chunks, scale, with_gradient, with_logits)
                return compute_loss(
                    self.lm, hidden, targets, denominator, chunk_size=self._loss_chunk, scale=scale,
                    with_gradient=with_gradient, with_logits=with_logits,
                )  # fmt: skip
        return self._pieces(hidden, targets, denominator, chunks, scale, with_gradient, with_logits)

    def _pieces(
        self, hidden: torch.Tensor, targets: torch.Tensor, denominator: float, chunks: HeadChunks | SlicedHead,
        scale: float, with_gradient: bool, with_logits: bool,
    ) -> LossResult:  # fmt: skip
        hidden = hidden.detach()
        result = vocabulary_loss(
            self.lm, hidden, targets.to(hidden.device), denominator, chunks,
            positions=self._loss_chunk or targets.numel(), scale=scale, with_gradient=with_gradient,
        )  # fmt: skip
        logits = vocabulary_logits(self.lm, hidden, chunks) if with_logits else None
        return dataclasses.replace(result, logits=logits)

    def _slices_head(self) -> bool:
        """Whether a chunked loss may cut the vocabulary too: not in exact mode, and where the family allows it."""
        head = self.lm.head
        if self._loss_chunk is None or type(head) is not nn.Linear:
            return False
        if self._sliceable is None:
            try:
                check_head(self.lm, torch.empty(0, head.in_features, dtype=head.weight.dtype, device=self.device),
                           SlicedHead(head.weight).ranges)  # fmt: skip
                self._sliceable = True
            except UnsupportedError as error:
                logger.info("the loss is cut by positions only: %s", error)
                self._sliceable = False
        return self._sliceable

    def _update(self) -> dict[str, Any]:
        """Settle, check and clip the gradients, then step the optimizer and empty them."""
        parameters = self._parameters() if self._masters is None else self._masters.masters
        self._window.settle(parameters)
        self._scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        overflow = norm != norm or norm in (float("inf"), -float("inf"))
        if overflow and not self._scaler.is_enabled():
            if self._masters is not None:
                self._masters.hand_back_gradients()
            place = first_bad_gradient(self.streamer.layers)
            self.discard_window()
            raise NonFiniteError(
                f"the gradient norm is {norm} at step {self.global_step + 1}, first seen in the backward at {place}; "
                "the optimizer was not stepped. Lower the learning rate or look at the data of this step"
            )
        if self.config.max_grad_norm is not None and not overflow:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, torch.tensor(norm))
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._settle_state()
        self.discard_window()
        if overflow:
            logger.warning("fp16 overflow: update skipped, loss scale now %g", self._scaler.get_scale())
        else:
            self.global_step += 1
        return {"grad_norm": norm, "skipped": overflow}

    def _settle_state(self) -> None:
        if not self._state_settled and self.optimizer.state:
            keep_state_apart(self.optimizer)
            self._state_settled = True

    def discard_window(self) -> None:
        """Forget the gradients accumulated since the last optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._masters is not None:
            self._masters.drop_gradients()
        self._window.reset()

    # -- state -----------------------------------------------------------------------------------

    def save_checkpoint(self, directory: str | os.PathLike[str]) -> Path:
        """Write adapter, config, optimizer, counters and random state, replacing the directory in one step."""
        if self.lora_manager is None:
            raise ConfigError("there is nothing to save: use_lora is off")
        state = {
            "global_step": self.global_step,
            "window": self._window.state(),
            "scaler": self._scaler.state_dict(),
        }
        save_checkpoint(
            Path(directory), self.config, self.lora_manager, self.optimizer, state, self._holders_of_gradients()
        )
        return Path(directory)

    def load_checkpoint(self, directory: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint as if never stopped.

        Raises:
            CheckpointError: incomplete, damaged, or of another adapter or optimizer.
        """
        if self.lora_manager is None:
            raise ConfigError("there is nothing to resume: use_lora is off")
        state = load_checkpoint(Path(directory), self.lora_manager, self.optimizer, self._holders_of_gradients())
        if self._masters is not None:
            self._masters.adopt()
        self.global_step = state["global_step"]
        self._window.restore(state["window"])
        self._state_settled = False
        self._settle_state()
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def _holders_of_gradients(self) -> dict[str, nn.Parameter]:
        """By the adapter's names, the parameters whose gradients the optimizer sees."""
        assert self.lora_manager is not None
        named = self.lora_manager.named_parameters()
        if self._masters is None:
            return dict(named)
        return {name: master for (name, _), master in zip(named, self._masters.masters, strict=True)}

    @property
    def model(self) -> nn.Module:
        """The model whose mode is switched: PEFT's around transformers', or the bare one."""
        return self.lora_manager.peft_model if self.lora_manager is not None else self.lm.module

    @property
    def _loss_chunk(self) -> int | None:
        plan = self.memory.plan
        return self.config.loss_chunk_size if plan is None else plan.loss_chunk_size

    def _turn(self) -> None:
        """Between two phases of a step, memory of the last one goes back to the system where memory is short."""
        if self.memory.plan is not None:
            self.streamer.heap.relieve()
        elif self.memory.streamed:
            give_back_idle_heap()

    def _place_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Let gradients of a new window gather in one buffer of their own, off the heap that layers use."""
        if self._masters is not None or self._window.calls or any(p.grad is not None for p in parameters):
            return
        if self._gradients is None:
            nbytes = sum(p.numel() * p.dtype.itemsize for p in parameters)
            on_cpu = self.device.type == "cpu"
            self._gradients = page_aligned(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8).to(self.device)
        self._gradients.zero_()
        offset = 0
        for parameter in parameters:
            parameter.grad = typed_view(self._gradients, offset, parameter.dtype, parameter.shape)
            offset += parameter.numel() * parameter.dtype.itemsize

    def _save_if_due(self, outcome: dict[str, Any]) -> None:
        stepped = "grad_norm" in outcome and not outcome["skipped"]
        if stepped and self.config.save_steps > 0 and self.global_step % self.config.save_steps == 0:
            self.save_checkpoint(Path(self.config.output_dir) / f"checkpoint-{self.global_step}")

    def _loss_scale(self) -> float:
        if not self._scaler.is_enabled():
            return 1.0
        return float(self._scaler.scale(torch.ones((), device=self.config.device)))

    def _check_loss(self, result: LossResult, batch: Batch, random_state: RandomState) -> None:
        if result.loss == result.loss and abs(result.loss) != float("inf"):
            return
        place = first_bad_activation(self.lm, batch, random_state)
        self.discard_window()
        raise NonFiniteError(
            f"the loss is {result.loss} at step {self.global_step + 1}, first seen in the output of {place}; the "
            "optimizer was not stepped. Lower the learning rate, or use bfloat16 or float32 if this is float16"
        )

    @contextlib.contextmanager
    def _accounted(self, batch: Batch | None, training: bool = True) -> Iterator[dict[str, Any]]:
        """Fill `last_step`; if the block is left by an error or Ctrl-C, stop every reader and, in training, drop the
        window, whose gradients may be half there."""
        started, before = time.perf_counter(), self.memory.stats
        outcome: dict[str, Any] = {}
        try:
            yield outcome
        except BaseException:
            self.memory.abort()
            if training:
                self.discard_window()
            raise
        used = self.memory.stats - before
        self.last_step = StepReport(
            step_seconds=time.perf_counter() - started,
            wait_seconds=used.wait_seconds,
            bytes_read=used.bytes_read,
            loads=used.loads,
            peak_bytes=_peak_bytes(self.config.device),
            num_targets=batch.num_targets if batch is not None else 0,
            **outcome,
        )

    def _parameters(self) -> list[nn.Parameter]:
        if self.lora_manager is None:
            raise ConfigError("labels were given but nothing can be trained: use_lora is off; use eval_step")
        return self.lora_manager.get_trainable_parameters()

    def _default_optimizer(self) -> torch.optim.Optimizer:
        if self.lora_manager is None:
            return torch.optim.AdamW([nn.Parameter(torch.empty(0))], lr=self.config.learning_rate)
        return torch.optim.AdamW(self.lora_manager.get_trainable_parameters(), lr=self.config.learning_rate)

    def _check_optimizer(self) -> None:
        if self.lora_manager is None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        own = self.lora_manager.get_trainable_parameters()
        if own and not any(id(p) in held for p in own):
            raise ConfigError(
                "the optimizer holds none of the model's LoRA parameters; make it from get_trainable_parameters() of "
                "this model, after initialize_lora()"
            )


def _peak_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
