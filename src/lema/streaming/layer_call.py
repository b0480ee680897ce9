"""One call of a layer: its arguments kept for a replay, the batch cut into micro-batches, outputs joined again.

It knows how to run a layer as it was run before; it knows nothing of where weights are or of autograd's functions.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..errors import UnsupportedError
from .arguments import Arguments, BatchRules, changed_leaves, containers, is_of_a_layer, named_leaves, of_a_layer
from .draws import Draws
from .randomness import RandomState
from .trees import put_together, take_apart


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


@dataclass(slots=True)
class Batching:
    """How many rows a layer runs at once, and the rules for cutting its arguments."""

    micro_batch_size: int | None
    learn: Callable[[], BatchRules]
    _rules: BatchRules | None = None

    def cuts(self, batch: int) -> list[tuple[int, int]]:
        """Row ranges of the micro-batches."""
        size = self.micro_batch_size or batch
        return [(start, min(start + size, batch)) for start in range(0, batch, size)]

    @property
    def rules(self) -> BatchRules:
        """Learned when first needed."""
        if self._rules is None:
            self._rules = self.learn()
        return self._rules


class Runs(Protocol):
    """A layer, as a call of it asks."""

    name: str
    batching: Batching
    draws: Draws

    @property
    def training(self) -> bool:
        """Whether random numbers may be drawn."""

    def run(self, hidden: torch.Tensor, arguments: Arguments) -> Any:
        """The layer's own forward."""


@dataclass(slots=True)
class LayerGraph:
    """A micro-batch of a layer with its graph: hidden states and arguments that may want a gradient, and outputs."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows of a batch; None: all of it at once."""

    number: int
    rows: tuple[int, int] | None

    def of(self, tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        """The tensor's part, by its batch dimension; None: it has none."""
        if self.rows is None or dim is None:
            return tensor
        return tensor.narrow(dim, self.rows[0], self.rows[1] - self.rows[0])


@dataclass(slots=True)
class LayerCall:
    """One call of a layer: everything a replay needs except its input."""

    layer: Runs
    arguments: Arguments
    """As they were, apart from any graph."""
    inputs: list[int]
    """Which of their leaves wanted a gradient."""
    autocast: Autocast
    cuts: list[Cut]
    dims: list[int | None]
    """Batch dimensions of the hidden states and of the inputs; unused where all rows run at once."""
    random_states: dict[int, RandomState] = field(default_factory=dict)
    template: Any = None
    output_dims: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, layer: Runs, hidden: torch.Tensor, arguments: Arguments) -> LayerCall:
        """A call that begins now."""
        given = [value for _, value in named_leaves(*arguments)]
        inputs = [i for i, v in enumerate(given) if isinstance(v, torch.Tensor) and v.requires_grad]
        kept = changed_leaves(arguments, lambda _, v: _without_its_graph(v) if isinstance(v, torch.Tensor) else v)
        autocast = Autocast.now(hidden.device.type)
        batching = layer.batching
        if batching.micro_batch_size is None:
            return cls(layer, kept, inputs, autocast, [Cut(0, None)], [None] * (1 + len(inputs)))
        dim = batching.rules.of_hidden(hidden)
        rows = hidden.shape[dim]
        named = list(named_leaves(*kept))
        dims = [dim, *(batching.rules.of_argument(*named[i], rows) for i in inputs)]
        ranges = batching.cuts(rows)
        cuts = [Cut(i, r if len(ranges) > 1 else None) for i, r in enumerate(ranges)]
        return cls(layer, kept, inputs, autocast, cuts, dims)

    def prepared(self, cut: Cut, hidden: torch.Tensor, wanted: Sequence[bool]) -> tuple[Arguments, list[torch.Tensor]]:
        """Arguments of a micro-batch in containers of their own, and the tensors that gradients may be asked of: its
        hidden states and inputs, those `wanted` as leaves of a graph."""
        arguments = self.arguments
        if cut.rows is not None:
            rules, rows = self.layer.batching.rules, hidden.shape[self.dims[0] or 0]
            arguments = rules.rows(arguments, rows, *cut.rows)
        found = [cut.of(hidden, self.dims[0]).detach().requires_grad_(wanted[0])]
        numbers = itertools.count()

        def leaf(_: str, value: Any) -> Any:
            if next(numbers) in self.inputs:
                value = value.detach().requires_grad_(wanted[len(found)])
                found.append(value)
            return value

        return changed_leaves(arguments, leaf), found

    def run(self, hidden: torch.Tensor, arguments: Arguments) -> list[torch.Tensor]:
        """Tensors of all that the layer returns and writes to its containers; their places go into the template."""
        given = containers(arguments)
        before = [copy.copy(container) for container in given]
        output = self.layer.run(hidden, arguments)
        written = {
            number: writes
            for number, (was, container) in enumerate(zip(before, given, strict=True))
            if (writes := self._written(was, container))
        }
        self.template, tensors = take_apart((output, written))
        return tensors

    def _written(self, before: Any, container: Any) -> dict[Any, Any]:
        if isinstance(container, list):
            after: dict[Any, Any] = dict(enumerate(container))
            before = dict(enumerate(before))
        else:
            after = dict(container)
        if before.keys() - after.keys():
            raise UnsupportedError(f"{self.layer.name} takes entries out of a {type(container).__name__} it is given")
        return {key: value for key, value in after.items() if key not in before or before[key] is not value}

    def forward(self, hidden: torch.Tensor, replayed: bool = True) -> list[torch.Tensor]:
        """Tensors of the output, without a graph; for a replay the random state is noted where the layer drew."""
        parts: list[list[torch.Tensor]] = []
        none = [False] * (1 + len(self.inputs))
        for cut in self.cuts:
            arguments, (part, *_) = self.prepared(cut, hidden, none)
            with self.autocast.restored(), self._noted(cut.number, hidden.device, replayed):
                parts.append(self.run(part, arguments))
        return self._joined(parts)

    def forward_with_graph(
        self, hidden: torch.Tensor, wanted: Sequence[bool]
    ) -> tuple[list[LayerGraph], list[torch.Tensor]]:
        """Like `forward`, keeping each micro-batch's graph; the tensors returned have none."""
        graphs: list[LayerGraph] = []
        for cut in self.cuts:
            arguments, inputs = self.prepared(cut, hidden, wanted)
            with torch.enable_grad(), self.autocast.restored(), self._noted(cut.number, hidden.device):
                graphs.append(LayerGraph(inputs, self.run(inputs[0], arguments)))
        return graphs, self._joined([[output.detach() for output in graph.outputs] for graph in graphs])

    def replay(self, cut: Cut, hidden: torch.Tensor, wanted: Sequence[bool]) -> LayerGraph:
        """A micro-batch run again, with its graph."""
        arguments, inputs = self.prepared(cut, hidden, wanted)
        with self.replaying(cut.number):
            return LayerGraph(inputs, self.run(inputs[0], arguments))

    def _joined(self, parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """The micro-batches' outputs as those of the batch; hidden states have the rows where they came in."""
        if len(parts) == 1:
            self.output_dims = [0] * len(parts[0])
            return parts[0]
        self.output_dims = [self.dims[0] or 0, *[0] * (len(parts[0]) - 1)]
        for cut, outputs in zip(self.cuts, parts, strict=True):
            assert cut.rows is not None
            for dim, output in zip(self.output_dims, outputs, strict=True):
                if output.dim() <= dim or output.shape[dim] != cut.rows[1] - cut.rows[0]:
                    raise UnsupportedError(
                        f"{self.layer.name} makes a tensor {list(output.shape)} of {cut.rows[1] - cut.rows[0]} rows, "
                        "which cannot be joined with those of other micro-batches. Use micro_batch_size=None"
                    )
        return [torch.cat(pieces, dim) for dim, *pieces in zip(self.output_dims, *parts, strict=True)]

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

    def rebuild(self, tensors: list[torch.Tensor], arguments: Arguments) -> Any:
        """The layer's output in its own form; what the layer wrote is written to the containers it was called with."""
        hidden, *others = tensors
        output, written = put_together(self.template, [hidden, *map(of_a_layer, others)])
        if written:
            given = containers(arguments)
            for number, writes in written.items():
                for key, value in writes.items():
                    if isinstance(given[number], list) and key == len(given[number]):
                        given[number].append(value)
                    else:
                        given[number][key] = value
        return output


def _without_its_graph(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, marked as it was, without what made it."""
    if not tensor.requires_grad:
        return tensor
    return of_a_layer(tensor.detach()) if is_of_a_layer(tensor) else tensor.detach()
