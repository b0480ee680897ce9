"""What a step takes in memory and arithmetic, found by running single layers on tensors without memory.

It knows how to count the bytes that are alive while the engine's own code runs; it knows nothing of
budgets or tiers. It needs a model's configuration and no weights.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..core.gbi import GlobalBinaryIndex
from ..core.lora import LoRAManager
from ..core.plan import LayerCost, LossCost, ModelSizes, Workload
from ..models.sizes import model_sizes
from ..models.stages import layer_arguments
from ..models.transformers_adapter import TransformersAdapter
from .loss import _piece
from .streamed_layer import _take_apart, _take_hidden


class Counting(TorchDispatchMode):
    """Counts bytes of storages made inside the mode, alive now and most alive at once, and operations of matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.flops = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        self._seen.update(leaf.untyped_storage() for leaf in given if isinstance(leaf, torch.Tensor))
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


class DryRun:
    """A model of a configuration on tensors without memory.

    Args:
        adapter: a transformers adapter of its own, not one that is bound; its dtype and attention are used.
        lora: settings as `LoRAManager` takes them; None: nothing is trained.
    """

    def __init__(self, adapter: TransformersAdapter, lora: dict[str, Any] | None) -> None:
        self.lm = adapter.causal_lm()
        self.adapter = adapter
        self.parameters = 0
        if lora is not None:
            manager = LoRAManager(lora, device="cpu")
            manager.attach(adapter, empty=True)
            self.parameters = sum(parameter.numel() for parameter in manager.get_trainable_parameters())
        self.lm.pass_on(torch.empty(0))
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            _without_memory(self.lm.module, self._fake)
        self._kinds = _distinct(list(self.lm.layers))

    def sizes(self) -> ModelSizes:
        """Bytes of the model's parts, each tensor stored in the type it is computed with."""
        return model_sizes(self.adapter, self.parameters)

    def sizes_in(self, adapter: TransformersAdapter, gbi: GlobalBinaryIndex) -> ModelSizes:
        """Bytes of the parts of a model as these weights hold it."""
        return model_sizes(adapter, self.parameters, gbi)

    def workload(self, batch: int, seq: int) -> Workload:
        """What a step on `[batch, seq]` tokens takes."""
        size = self.adapter.dtype.itemsize
        return Workload(
            batch=batch,
            seq=seq,
            boundary=batch * seq * self.adapter.hidden_size * size,
            layer=functools.cache(lambda rows: self.layer(rows, seq)),
            loss=functools.cache(lambda positions: self.loss(positions)),
        )

    def layer(self, rows: int, seq: int) -> LayerCost:
        """The most that any kind of layer takes for a micro-batch of `[rows, seq]`."""
        costs = [self._layer(unit, rows, seq) for unit in self._kinds]
        return LayerCost(*(max(getattr(cost, name) for cost in costs) for name in LayerCost.__slots__))

    def _layer(self, unit: int, rows: int, seq: int) -> LayerCost:
        layer = self.lm.layers[unit]
        with self._fake:
            arguments = layer_arguments(self.lm, unit, (rows, seq))
            like, rest = _take_hidden(*arguments)
            with torch.no_grad(), Counting() as forward:
                _take_apart(layer(like, *rest[0], **rest[1]))
            hidden = torch.empty_like(like).requires_grad_()
            gradient = torch.empty_like(like)
            wanted = [p for p in layer.parameters() if p.requires_grad]
            with Counting() as both:
                _, outputs = _take_apart(layer(hidden, *rest[0], **rest[1]))
                graph = both.now
                found = torch.autograd.grad(outputs[0], [hidden, *wanted], gradient, allow_unused=True)
            del outputs, found
        return LayerCost(
            forward_peak=forward.peak,
            graph=graph,
            backward_peak=both.peak,
            forward_flops=forward.flops,
            backward_flops=both.flops - forward.flops,
            kernel_scratch=0 if like.dtype is torch.float32 else max(p.nbytes for p in layer.parameters()),
        )

    def loss(self, positions: int) -> LossCost:
        """Head and loss with their gradient for a chunk of target positions."""
        with self._fake:
            hidden = torch.empty(1, positions, self.adapter.hidden_size, dtype=self.adapter.dtype)
            targets = torch.empty(1, positions, dtype=torch.long)
            with Counting() as live:
                _piece(self.lm, hidden, targets, 1.0, 1.0, True)
        return LossCost(peak=live.peak, flops=live.flops)


def _without_memory(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace every parameter and buffer by one of the same shape and type that has no memory."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake.from_tensor(buffer)


def _distinct(layers: list[nn.Module]) -> list[int]:
    """One layer of each kind: its class, shapes and kind of attention."""
    kinds: dict[Any, int] = {}
    for unit, layer in enumerate(layers):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        kinds.setdefault((type(layer), getattr(layer, "attention_type", None), shapes), unit)
    return list(kinds.values())
