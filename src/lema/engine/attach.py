"""Attaches streamed layers to a model, and begins its sweeps; takes them off again.

It knows a model's parts and the memory manager; it knows nothing of losses, optimizers or files.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..machine.heap import HeapGuard
from ..models.causal_lm import CausalLM
from ..streaming.arguments import BatchRules
from ..streaming.draws import Draws
from ..streaming.layer_call import Batching
from ..streaming.memory import TripleBufferManager
from ..streaming.recompute import StreamedLayer
from ..streaming.schedule import Schedule
from .guards import guard, guard_peft
from .loss.streamed_head import streamed_forward
from .trial import fault_of_training, kinds_of

logger = logging.getLogger(__name__)

_REFUSED_OUTPUTS = {
    "output_attentions": "attention weights",
    "output_router_logits": "router logits and their auxiliary loss",
}
_NAMES = ("decoder", "layers", "head", "sweeps", "guards", "adapters")


def attach(
    lm: CausalLM,
    memory: TripleBufferManager,
    micro_batch_size: int | None = None,
    peft_model: nn.Module | None = None,
) -> Attachment:
    """Let a model's layers wait for their weights; one that was attached before is first taken off.

    Afterwards the model is called, trained and generated with like any other, by whatever trainer: its own forward
    calls its layers, and each call of the whole model tells the memory manager which visits to expect.

    Args:
        lm: the model.
        memory: holds its weights, where a plan has them.
        micro_batch_size: rows a layer runs at once; None: as planned, or all.
        peft_model: PEFT's model around it, whose adapters a trainer will save.
    """
    lm.interceptor.take_off(*_NAMES)
    return Attachment(lm, memory, micro_batch_size, peft_model)


class Attachment:
    """A model whose layers wait for their weights. `attach` makes it.

    Everything that is put in place of the model's own lies with its interceptor, under one name a part: the forwards of
    the layers, of the head where it streams and of the decoder; hooks of the whole model; what keeps weights that are
    not there from being cast, merged or saved.
    """

    def __init__(
        self, lm: CausalLM, memory: TripleBufferManager, micro_batch_size: int | None, peft_model: nn.Module | None
    ) -> None:
        self.lm = lm
        self.memory = memory
        trained = any(parameter.requires_grad for parameter in lm.module.parameters())
        self.fault = fault_of_training(lm) if trained else ""
        """Why this model is not to be trained, though it can be asked; empty if it may be."""
        plan = memory.plan
        if micro_batch_size is None and plan.micro_batch_size < plan.batch:
            micro_batch_size = plan.micro_batch_size
        self.batching = Batching(micro_batch_size, lambda: BatchRules.learn(lm))
        self.heap = HeapGuard(memory.heap_limit, plan.keeps_idle_heap)
        self.draws = Draws(lm.layers)
        self.layers = [
            StreamedLayer(unit, layer, memory, self.batching, self.heap, self.draws)
            for unit, layer in enumerate(lm.layers)
        ]
        for unit in plan.keep_activations:
            self.layers[unit].keeps_graph = True
        self._told = False
        self._put_in_place(peft_model)

    def _put_in_place(self, peft_model: nn.Module | None) -> None:
        lm, own = self.lm, self.lm.interceptor
        for streamed, layer in zip(self.layers, lm.layers, strict=True):
            own.replace("layers", layer, "forward", streamed)
        if lm.head is not None and (forward := streamed_forward(lm.head, self.memory)) is not None:
            own.replace("head", lm.head, "forward", forward)
        own.hook("sweeps", lm.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        own.hook("sweeps", lm.module.register_forward_hook(self._end))
        own.hook("sweeps", lm.module.register_forward_hook(self._give_turn, always_call=True))
        guard(lm, self.memory)
        if peft_model is not None:
            guard_peft(own, peft_model)

    def detach(self) -> None:
        """Leave the model as it was before `attach`; its weights are then wherever they happen to be.

        Raises:
            BindingError: somebody has replaced the same since; nothing was taken off.
        """
        self.lm.interceptor.take_off(*_NAMES)
        self.heap.close()

    def prepare(self) -> None:
        """Learn how to cut the arguments of layers where they may be cut: no forward runs inside another."""
        if self.batching.micro_batch_size is not None:
            _ = self.batching.rules

    def lowest_trainable(self) -> int:
        """The deepest layer a gradient has to reach; the number of layers if there is none."""
        return next((s.unit for s in self.layers if s.trainables()), len(self.layers))

    def _tell_of_unused(self) -> None:
        """Say once, when there has been a backward, to which adapters of layers no gradient leads."""
        if self._told or all(layer.unused is None for layer in self.layers):
            return
        self._told = True
        without = {id(p) for layer in self.layers for p in (layer.unused or {}).values()}
        inside = {id(p) for layer in self.layers for p in layer.trainables()}
        named = [(n, id(p)) for n, p in self.lm.module.named_parameters() if id(p) in inside] if without else []
        if unused := kinds_of(n for n, p in named if p in without) - kinds_of(n for n, p in named if p not in without):
            logger.warning(
                "no gradient leads to %s: adapters there learn nothing, as with transformers + PEFT; leave them out "
                "with exclude_modules", ", ".join(sorted(unused)),
            )  # fmt: skip

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.memory.turn.take("the model")
        _refuse_outputs(getattr(module, "config", None), kwargs)
        if kwargs.get("labels") is not None and kwargs.get("output_router_logits") is None:
            check_router_loss(self.lm)
        self.memory.check_bindings()
        self.memory.gbi.check_unchanged()
        count = len(self.layers)
        lowest = self.lowest_trainable() if torch.is_grad_enabled() else count
        if lowest < count:
            self._tell_of_unused()
            kwargs.setdefault("use_cache", False)
            self.memory.predict(Schedule.training(count, lowest))
            self.draws.begin(self.memory.compute_device)
        else:
            self.memory.predict(Schedule.inference(count))
        return args, kwargs

    def _end(self, *_: Any) -> None:
        self.draws.end()

    def _give_turn(self, *_: Any) -> None:
        self.memory.turn.give()


def _refuse_outputs(config: Any, kwargs: dict[str, Any]) -> None:
    for name, label in _REFUSED_OUTPUTS.items():
        if kwargs.get(name) or (kwargs.get(name) is None and getattr(config, name, False)):
            raise UnsupportedError(
                f"{name}=True asks for {label}, which are not right while layers are streamed; set it to False"
            )


def check_router_loss(lm: CausalLM, leave_out: bool = False) -> None:
    """Refuse to train a mixture whose configuration adds its routers' auxiliary loss, or from now on leave that out.

    Raises:
        UnsupportedError: says how to train without it.
    """
    router_loss = getattr(lm, "router_loss", None)
    if router_loss is not None and leave_out:
        lm.router_loss = None
    elif router_loss is not None:
        raise UnsupportedError(
            f"{type(lm.module).__name__}'s configuration adds the auxiliary loss of its routers ({router_loss}), which "
            "is not computed while layers are streamed. Set leave_out_router_loss: true to train without it"
        )
