"""A decoder layer whose weights come and go: run without a graph, run again in the backward.

It knows how to replay a layer exactly; it knows nothing of where weights come from or of the loss.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..machine.heap import HeapGuard
from .arguments import Arguments, check_replayable, holds_cache, named_leaves, take_hidden
from .boundaries import KeptBoundaries
from .draws import Draws
from .layer_call import Batching, LayerCall, LayerGraph
from .schedule import Phase
from .weight_store import WeightStore

_BESIDE_A_GRAPH = KeptBoundaries(copied=False)  # the graph holds the tensor in any case


class StreamedLayer:
    """Stands in for a layer's `forward`.

    Mechanics: without gradients the layer simply runs while its weights are there. With gradients an
    autograd function keeps the layer's input (the boundary activation) and its arguments; its backward
    waits for the weights again, re-runs the layer on the same random state and autocast state, and takes
    the gradients of the input and of the layer's trainable parameters. With a micro-batch size both
    passes go through the batch in pieces while the weights are there, and parameter gradients are summed.

    What else travels between layers is treated alike: an argument that wants a gradient is an input, and
    whatever a layer returns beside its hidden states or writes to a list or dictionary it was given (keys
    and values that later layers use) is an output. Each run gets containers of its own, as they were.
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
        self.unused: dict[int, nn.Parameter] | None = None
        """Trained parameters that no backward so far had a gradient for; None before the first."""
        self.module = layer
        self._forward = type(layer).forward

    def trainables(self) -> list[nn.Parameter]:
        """The layer's parameters that want a gradient now."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def note(self, parameters: list[nn.Parameter], gradients: list[torch.Tensor | None]) -> None:
        """Remember what a backward had no gradient for, and never had before."""
        if self.unused is None or self.unused:
            without = {id(p): p for p, g in zip(parameters, gradients, strict=True) if g is None}
            self.unused = without if self.unused is None else {k: p for k, p in without.items() if k in self.unused}

    def run(self, hidden: torch.Tensor, arguments: Arguments) -> Any:
        """The layer's own forward."""
        return self._forward(self.module, hidden, *arguments[0], **arguments[1])

    @property
    def training(self) -> bool:
        """Whether random numbers may be drawn."""
        return self.module.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, arguments = take_hidden(args, kwargs)
        parameters: list[nn.Parameter] = []
        inputs: list[torch.Tensor] = []
        if torch.is_grad_enabled():
            parameters = self.trainables()
            inputs = [v for _, v in named_leaves(*arguments) if isinstance(v, torch.Tensor) and v.requires_grad]
        if not (parameters or inputs or (torch.is_grad_enabled() and hidden.requires_grad)):
            return self._without_graph(hidden, arguments)
        check_replayable(self.name, *arguments)
        call = LayerCall.of(self, hidden, arguments)
        outputs = _Replayed.apply(self, call, len(inputs), hidden, *inputs, *parameters)
        return call.rebuild(list(outputs), arguments)

    def _without_graph(self, hidden: torch.Tensor, arguments: Arguments) -> Any:
        with torch.no_grad(), self.memory.use(self.unit, Phase.FORWARD):
            if holds_cache(*arguments):
                return self.run(hidden, arguments)
            call = LayerCall.of(self, hidden, arguments)
            return call.rebuild(call.forward(hidden, replayed=False), arguments)


class _Replayed(torch.autograd.Function):
    """Boundary activation in, layer recomputed in the backward, unless its graph was kept and is still good."""

    @staticmethod
    def forward(
        ctx: Any, layer: StreamedLayer, call: LayerCall, count: int, hidden: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`rest` are as many inputs as counted, and the layer's parameters."""
        memory, unit = layer.memory, layer.unit
        ctx.graphs = []
        with memory.use(unit, Phase.FORWARD):
            if layer.keeps_graph:
                ctx.generation = memory.generation(unit)
                ctx.graphs, outputs = call.forward_with_graph(hidden, [hidden.requires_grad, *[True] * count])
            else:
                outputs = call.forward(hidden)
        layer.heap.relieve()
        ctx.layer, ctx.call = layer, call
        ctx.parameters = rest[count:]
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
        layer: StreamedLayer = ctx.layer
        call: LayerCall = ctx.call
        ends = 4 + len(call.inputs)
        of_inputs, of_parameters = ctx.needs_input_grad[3:ends], ctx.needs_input_grad[ends:]
        wanted = [p for p, needed in zip(ctx.parameters, of_parameters, strict=True) if needed]
        parts: list[list[torch.Tensor | None]] = []
        sums: list[torch.Tensor | None] = [None] * len(wanted)
        memory, unit = layer.memory, layer.unit
        graphs: list[LayerGraph] = ctx.graphs
        with memory.use(unit, Phase.BACKWARD):
            good = bool(graphs) and ctx.generation == memory.generation(unit)
            for cut in call.cuts:
                graph = graphs[cut.number] if good else call.replay(cut, hidden, of_inputs)
                pairs = [
                    (output, cut.of(gradient, dim))
                    for output, gradient, dim in zip(graph.outputs, output_gradients, call.output_dims, strict=True)
                    if gradient is not None and output.requires_grad
                ]
                asked = [t for t, needed in zip(graph.inputs, of_inputs, strict=True) if needed]
                if not pairs or not (asked or wanted):
                    parts.append([None] * len(asked))
                    continue
                gradients: list[torch.Tensor | None] = list(
                    torch.autograd.grad(
                        [o for o, _ in pairs], [*asked, *wanted], [g for _, g in pairs], allow_unused=True
                    )
                )
                parts.append(gradients[: len(asked)])
                sums = [_add(total, gradient) for total, gradient in zip(sums, gradients[len(asked) :], strict=True)]
                del graph, pairs, asked
        graphs.clear()
        layer.note(wanted, sums)
        layer.heap.relieve()
        dims = [dim for dim, needed in zip(call.dims, of_inputs, strict=True) if needed]
        joined = iter([_join(pieces, dim) for dim, *pieces in zip(dims, *parts, strict=True)])
        found = iter(sums)
        return (
            None,
            None,
            None,
            *(next(joined) if needed else None for needed in of_inputs),
            *(next(found) if needed else None for needed in of_parameters),
        )


def _add(total: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)


def _join(parts: list[torch.Tensor | None], dim: int | None) -> torch.Tensor | None:
    """A gradient out of its micro-batches': rows one after the other; of what all of them shared, the sum."""
    found = [part for part in parts if part is not None]
    if (len(found) <= 1 and len(parts) == len(found)) or not found:
        return found[0] if found else None
    if dim is None:
        return functools.reduce(torch.add, found)
    assert len(found) == len(parts), "some rows of a batch got a gradient and others none"
    return torch.cat(found, dim)
