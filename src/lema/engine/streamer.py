"""Installs streamed layers in a model and begins its sweeps.

It knows a model's layers and the memory manager; it knows nothing of losses, optimizers or files.
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
from ..streaming.memory import TripleBufferManager
from ..streaming.recompute import Batching, StreamedLayer
from ..streaming.schedule import Schedule
from .guards import guard
from .loss.streamed_head import ChunkedHead, StreamedHead

logger = logging.getLogger(__name__)


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


_REFUSED_OUTPUTS = {
    "output_attentions": "attention weights",
    "output_router_logits": "router logits and their auxiliary loss",
}


class LayerStreamer:
    """A model whose layers wait for their weights.

    After construction the model is called, trained and generated with like any other: its own forward
    calls its layers, and each call of the whole model tells the memory manager which visits to expect.

    Args:
        lm: the model.
        memory: holds its weights.
        micro_batch_size: rows a layer runs at once; None: all.
    """

    def __init__(self, lm: CausalLM, memory: TripleBufferManager, micro_batch_size: int | None = None) -> None:
        self.lm = lm
        self.memory = memory
        plan = memory.plan
        if micro_batch_size is None and plan.micro_batch_size < plan.batch:
            micro_batch_size = plan.micro_batch_size
        self.batching = Batching(micro_batch_size, lambda: BatchRules.learn(lm))
        self.layers = [StreamedLayer(unit, layer, memory, self.batching) for unit, layer in enumerate(lm.layers)]
        for streamed, layer in zip(self.layers, lm.layers, strict=True):
            layer.__dict__["forward"] = streamed
        self.heap = HeapGuard(memory.heap_limit, plan.keeps_idle_heap)
        self.draws = Draws(lm.layers)
        for streamed in self.layers:
            streamed.heap, streamed.draws = self.heap, self.draws
        for unit in plan.keep_activations:
            self.layers[unit].keeps_graph = True
        if memory.head_chunks is not None and isinstance(lm.head, nn.Linear):
            lm.head.__dict__["forward"] = ChunkedHead(lm.head, memory.head_chunks)
        elif memory.streams_head and lm.head is not None:
            lm.head.__dict__["forward"] = StreamedHead(lm.head, memory)
        lm.module.register_forward_pre_hook(self._begin, with_kwargs=True)
        lm.module.register_forward_hook(self._end)
        lm.module.register_forward_hook(self._give_turn, always_call=True)
        guard(lm, memory)

    def prepare(self, batch: int) -> None:
        """Learn how to cut the layers' arguments, if a batch of this many rows will be cut."""
        if len(self.batching.cuts(batch)) > 1:
            _ = self.batching.rules

    def lowest_trainable(self) -> int:
        """The deepest layer a gradient has to reach; the number of layers if there is none."""
        return next((s.unit for s in self.layers if s.trainables()), len(self.layers))

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.memory.turn.take("the model")
        config = getattr(module, "config", None)
        for name, label in _REFUSED_OUTPUTS.items():
            if kwargs.get(name) or (kwargs.get(name) is None and getattr(config, name, False)):
                raise UnsupportedError(
                    f"{name}=True asks for {label}, which are not right while layers are streamed; set it to False"
                )
        if kwargs.get("labels") is not None and kwargs.get("output_router_logits") is None:
            check_router_loss(self.lm)
        count = len(self.layers)
        self.memory.check_bindings()
        self.memory.gbi.check_unchanged()
        lowest = self.lowest_trainable() if torch.is_grad_enabled() else count
        if lowest < count:
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
