"""A decoder layer whose weights come and go: run without a graph, run again in the backward.

It knows how to replay a layer exactly; it knows nothing of where weights come from or of the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..machine.heap import HeapGuard
from .arguments import Arguments, BatchRules, check_replayable, holds_cache, of_a_layer
from .boundaries import KeptBoundaries
from .draws import Draws
from .randomness import RandomState
from .schedule import Phase
from .weight_store import WeightStore

_BESIDE_A_GRAPH = KeptBoundaries(copied=False)  # the graph holds the tensor in any case


@dataclass(slots=True)
class Autocast:
    """Autocast state of one device type, to be set again in the backward, which may run outside of it.

    The weight cache stays off: a cast made without a graph must not be reused where one is needed.
    """

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def restored(self) -> contextlib.AbstractContextManager[Any]:
        if not self.enabled and not torch.is_autocast_enabled(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype, self.enabled, cache_enabled=False)


class StreamedLayer:
    """Stands in for a layer's `forward`.

    Mechanics: without gradients the layer simply runs while its weights are there. With gradients an
    autograd function keeps the layer's input (the boundary activation) and its arguments; its backward
    waits for the weights again, re-runs the layer on the same random state and autocast state, and takes
    the gradients of the input and of the layer's trainable parameters. With a micro-batch size both
    passes go through the batch in pieces while the weights are there, and parameter gradients are summed.
    """

    def __init__(
        self,
        unit: int,
        layer: nn.Module,
        memory: WeightStore,
        batching: Batching,
        heap: HeapGuard,
        draws: Draws,
    ) -> None:
        self.unit = unit
        self.name = f"layer {unit} ({type(layer).__name__})"
        self.memory = memory
        self.batching = batching
        self.heap = heap
        self.draws = draws
        self.keeps_graph = False
        """Whether the forward keeps its graph; where weights were reloaded since, the backward recomputes after all."""
        self.module = layer
        self._forward = type(layer).forward

    def trainables(self) -> list[nn.Parameter]:
        """The layer's parameters that want a gradient now."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def run(self, hidden: torch.Tensor, arguments: Arguments) -> Any:
        """The layer's own forward."""
        return self._forward(self.module, hidden, *arguments[0], **arguments[1])

    @property
    def training(self) -> bool:
        """Whether random numbers may be drawn."""
        return self.module.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, arguments = take_hidden(args, kwargs)
        parameters = self.trainables() if torch.is_grad_enabled() else []
        if not parameters and not (torch.is_grad_enabled() and hidden.requires_grad):
            return self._without_graph(hidden, arguments)
        check_replayable(self.name, *arguments)
        call = self._call(hidden, arguments)
        outputs = _Replayed.apply(call, hidden, *parameters)
        return call.rebuild(list(outputs))

    def _without_graph(self, hidden: torch.Tensor, arguments: Arguments) -> Any:
        with torch.no_grad(), self.memory.use(self.unit, Phase.FORWARD):
            if holds_cache(*arguments):
                return self.run(hidden, arguments)
            call = self._call(hidden, arguments)
            return call.rebuild(call.forward(hidden, replayed=False))

    def _call(self, hidden: torch.Tensor, arguments: Arguments) -> LayerCall:
        rows = hidden.shape[0]
        return LayerCall(self, arguments, rows, self.batching.cuts(rows), Autocast.now(hidden.device.type))


class Batching:
    """How many rows a layer runs at once, and the rules for cutting its arguments.

    Args:
        planned: rows at once as the plan has it; None: all rows of a call.
        learn: finds the rules out.
    """

    def __init__(self, planned: int | None, learn: Callable[[], BatchRules]) -> None:
        self._planned = planned
        self._learn = learn
        self._of_a_window: int | None = None

    @property
    def micro_batch_size(self) -> int | None:
        """Rows at once of a call that is made now; None: all."""
        return min(filter(None, (self._planned, self._of_a_window)), default=None)

    @contextlib.contextmanager
    def in_windows(self, rows: int | None) -> Iterator[None]:
        """Inside the block a call is a whole window, of which no more rows run at once than this; the plan's number
        holds as well."""
        before, self._of_a_window = self._of_a_window, rows
        try:
            yield
        finally:
            self._of_a_window = before

    def cuts(self, batch: int) -> list[tuple[int, int]]:
        """Row ranges of the micro-batches."""
        size = self.micro_batch_size or batch
        return [(start, min(start + size, batch)) for start in range(0, batch, size)]

    @cached_property
    def rules(self) -> BatchRules:
        """Learned when first needed."""
        return self._learn()


@dataclass(slots=True)
class _Graph:
    """A micro-batch of a layer with its graph: input and outputs."""

    part: torch.Tensor
    outputs: list[torch.Tensor]


@dataclass(slots=True)
class LayerCall:
    """One call of a layer: everything a replay needs except its input."""

    layer: StreamedLayer
    arguments: Arguments
    batch: int
    cuts: list[tuple[int, int]]
    """Row ranges of its micro-batches."""
    autocast: Autocast
    random_states: dict[int, RandomState] = field(default_factory=dict)
    template: Any = None

    def micro_batches(self) -> Iterator[tuple[int, slice, Arguments]]:
        """Number, rows and arguments of each micro-batch."""
        if len(self.cuts) == 1:
            yield 0, slice(None), self.arguments
            return
        rules = self.layer.batching.rules
        for number, (start, end) in enumerate(self.cuts):
            yield number, slice(start, end), rules.rows(self.arguments, self.batch, start, end)

    def forward(self, hidden: torch.Tensor, replayed: bool = True) -> list[torch.Tensor]:
        """Tensors of the output, without a graph; for a replay the random state is noted where the layer drew."""
        parts: list[list[torch.Tensor]] = []
        for number, rows, arguments in self.micro_batches():
            with self.autocast.restored(), self._noted(number, hidden.device, replayed):
                self.template, tensors = take_apart(self.layer.run(hidden[rows], arguments))
            parts.append(tensors)
        return parts[0] if len(parts) == 1 else [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def forward_with_graph(self, hidden: torch.Tensor, input_wanted: bool) -> tuple[list[_Graph], list[torch.Tensor]]:
        """Like `forward`, keeping each micro-batch's graph; the tensors returned have none."""
        graphs: list[_Graph] = []
        for number, rows, arguments in self.micro_batches():
            part = hidden[rows].detach().requires_grad_(input_wanted)
            with torch.enable_grad(), self.autocast.restored(), self._noted(number, hidden.device):
                self.template, tensors = take_apart(self.layer.run(part, arguments))
            graphs.append(_Graph(part, tensors))
        outputs = [[output.detach() for output in graph.outputs] for graph in graphs]
        joined = outputs[0] if len(outputs) == 1 else [torch.cat(pieces) for pieces in zip(*outputs, strict=True)]
        return graphs, joined

    def replay(self, number: int, hidden: torch.Tensor, arguments: Arguments, input_wanted: bool) -> _Graph:
        """A micro-batch run again, with its graph."""
        part = hidden.detach().requires_grad_(input_wanted)
        with self.replaying(number):
            _, outputs = take_apart(self.layer.run(part, arguments))
        return _Graph(part, outputs)

    @contextlib.contextmanager
    def _noted(self, number: int, device: torch.device, wanted: bool = True) -> Iterator[None]:
        """Note the random state before the block if the block draws."""
        if not (wanted and self.layer.training and self.layer.draws.noting):
            yield
            return
        random_state = RandomState.now(device)
        yield
        if random_state.moved():
            self.random_states[number] = random_state
            self.layer.draws.drew()

    @contextlib.contextmanager
    def replaying(self, number: int) -> Iterator[None]:
        """Graph on, autocast and random state as in the forward; the random state is put back afterwards."""
        with torch.enable_grad(), self.autocast.restored():
            if number not in self.random_states:
                yield
                return
            with self.random_states[number].replayed():
                yield

    def rebuild(self, tensors: list[torch.Tensor]) -> Any:
        """The layer's output in its own form."""
        if self.template is None:
            return tensors[0]
        rest = iter(tensors)
        first, *others = [next(rest) if is_tensor else value for is_tensor, value in self.template]
        return (first, *map(of_a_layer, others))


class _Replayed(torch.autograd.Function):
    """Boundary activation in, layer recomputed in the backward, unless its graph was kept and is still good."""

    @staticmethod
    def forward(ctx: Any, call: LayerCall, hidden: torch.Tensor, *parameters: nn.Parameter) -> tuple[torch.Tensor, ...]:
        memory, unit = call.layer.memory, call.layer.unit
        ctx.graphs = []
        with memory.use(unit, Phase.FORWARD):
            if call.layer.keeps_graph:
                ctx.generation = memory.generation(unit)
                ctx.graphs, outputs = call.forward_with_graph(hidden, hidden.requires_grad)
            else:
                outputs = call.forward(hidden)
        call.layer.heap.relieve()
        ctx.call = call
        ctx.parameters = parameters
        ctx.boundaries = _BESIDE_A_GRAPH if ctx.graphs else memory.boundaries
        ctx.boundaries.save(ctx, unit, hidden)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with ctx.boundaries.saved(ctx) as hidden:
            return _Replayed._gradients(ctx, hidden, output_gradients)

    @staticmethod
    def _gradients(
        ctx: Any, hidden: torch.Tensor, output_gradients: tuple[torch.Tensor | None, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        call: LayerCall = ctx.call
        wanted = [p for p, needed in zip(ctx.parameters, ctx.needs_input_grad[2:], strict=True) if needed]
        hidden_parts: list[torch.Tensor | None] = []
        sums: list[torch.Tensor | None] = [None] * len(wanted)
        memory, unit = call.layer.memory, call.layer.unit
        graphs: list[_Graph] = ctx.graphs
        with memory.use(unit, Phase.BACKWARD):
            good = bool(graphs) and ctx.generation == memory.generation(unit)
            for number, rows, arguments in call.micro_batches():
                if good:
                    graph = graphs[number]
                else:
                    graph = call.replay(number, hidden[rows], arguments, ctx.needs_input_grad[1])
                pairs = [
                    (output, gradient[rows])
                    for output, gradient in zip(graph.outputs, output_gradients, strict=True)
                    if gradient is not None and output.requires_grad
                ]
                if not pairs:
                    hidden_parts.append(None)
                    continue
                inputs = [graph.part, *wanted] if ctx.needs_input_grad[1] else wanted
                gradients = list(
                    torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
                )
                hidden_parts.append(gradients.pop(0) if ctx.needs_input_grad[1] else None)
                sums = [_add(total, gradient) for total, gradient in zip(sums, gradients, strict=True)]
                del graph, pairs
        graphs.clear()
        call.layer.heap.relieve()
        found = iter(sums)
        return (
            None,
            _join(hidden_parts, hidden),
            *(next(found) if needed else None for needed in ctx.needs_input_grad[2:]),
        )


def _add(total: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)


def _join(parts: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor | None:
    if all(part is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0]
    assert all(part is not None for part in parts), "some rows of a batch got a gradient and others none"
    return torch.cat([part for part in parts if part is not None]).view_as(like)


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Arguments]:
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def take_apart(output: Any) -> tuple[list[tuple[bool, Any]] | None, list[torch.Tensor]]:
    """A layer's output as a template (None: a bare tensor) and its tensors."""
    if isinstance(output, torch.Tensor):
        return None, [output]
    template = [(True, None) if isinstance(item, torch.Tensor) else (False, item) for item in output]
    return template, [item for item in output if isinstance(item, torch.Tensor)]
