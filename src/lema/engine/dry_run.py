"""What a step takes in memory and arithmetic, found by running single layers on tensors without memory.

It knows how to count the bytes that are alive while the engine's own code runs; it knows nothing of
budgets or tiers. It needs a model's configuration and no weights.
"""

from __future__ import annotations

import copy
import itertools
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..errors import LemaError, UnsupportedError
from ..models.causal_lm import TransformersCausalLM
from ..models.lora import LoRAManager
from ..models.stages import layer_arguments
from ..models.transformers_adapter import TransformersAdapter
from ..planning.plan import LayerCost, LossCost
from ..streaming.arguments import Arguments, containers, hidden_of, take_hidden
from .loss.positions import loss_of_piece

logger = logging.getLogger(__name__)

_ANYTHING = Exception
"""What a family's code and torch raise where a shape depends on values or an operator is not prepared: no two agree,
and whatever it is, a real run tells what was asked."""

_SMALL = tuple((rows, length) for rows in (2, 3) for length in (16, 32, 48))
"""Shapes that a layer is run on for real where it cannot be run without memory."""


class Counting(TorchDispatchMode):
    """Counts bytes of storages made inside the mode, alive now and most alive at once, and operations of matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.flops = 0
        self.storages: list[int] = []
        """Bytes of each storage, in the order they were made."""
        self.order: list[int] = []
        """What happened: n where storage n was made, ~n where it was freed."""
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        self._seen.update(leaf.untyped_storage() for leaf in given if isinstance(leaf, torch.Tensor))
        packet = getattr(func, "_overloadpacket", None)
        grouped = str(packet) == "aten._grouped_mm"
        if grouped and isinstance(args[0], FakeTensor):
            # what torch has for it knows of fewer types than its kernels do
            result = args[0].new_empty(_grouped_shape(*args[:3]))
        else:
            result = func(*args, **(kwargs or {}))
        count = flop_registry.get(packet)
        if grouped:
            self.flops += _grouped_flops(*args[:2])
        elif str(packet).startswith("aten._scaled_dot_product_flash_attention_for_cpu"):
            self.flops += _attention_flops(*args)
        elif count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.order.append(len(self.storages))
                weakref.finalize(storage, self._freed, len(self.storages))
                self.storages.append(storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def _freed(self, number: int) -> None:
        self.order.append(~number)
        self.now -= self.storages[number]


class DryRun:
    """A model of a configuration on tensors without memory.

    Args:
        adapter: a transformers adapter of its own, not one that is bound; its dtype and attention are used.
        lora: settings as `LoRAManager` takes them; None: nothing is trained.
    """

    def __init__(self, adapter: TransformersAdapter, lora: dict[str, Any] | None) -> None:
        self.lm = adapter.causal_lm()
        self.adapter = adapter
        self.parameters = _with_lora(adapter, lora)
        self._lora = lora
        self._real: TransformersAdapter | None = None
        _ = self.lm.returns_several  # found out by a forward, for which tensors have to be real
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            _without_memory(self.lm.module, self._fake)
        self._head_input = self._hidden_states()
        self._kinds = _distinct(list(self.lm.layers))

    def _hidden_states(self) -> torch.Tensor:
        """What the head is given for one token, without memory."""
        try:
            with self._fake:
                return _around(self.lm)
        except _ANYTHING as error:
            self._say("the model around its layers", error)
        found = _around(self._measured())
        with self._fake:
            return torch.empty(found.shape, dtype=found.dtype)

    def _measured(self) -> TransformersCausalLM:
        """The same model with real tensors, its weights zeros of which there is one."""
        if self._real is None:
            self._real = TransformersAdapter(self.lm.module.config)
            self._real.configure(self.adapter.dtype, self.lm.module.config._attn_implementation)
            _with_lora(self._real, self._lora)
        return self._real.causal_lm()

    def _say(self, what: str, error: Exception) -> None:
        if isinstance(error, LemaError):
            raise error
        logger.warning(
            "what %s takes is measured with real tensors, as it cannot be run without memory (%s: %s)",
            what, type(error).__name__, str(error).partition("\n")[0],
        )  # fmt: skip

    @torch.enable_grad()  # whoever plans may be in a block without
    def layer(self, rows: int, seq: int) -> LayerCost:
        """The most that any kind of layer takes for a micro-batch of `[rows, seq]`."""
        costs = [self._layer(unit, rows, seq) for unit in self._kinds]
        return LayerCost(*(max(getattr(cost, name) for cost in costs) for name in LayerCost.__slots__))

    def _layer(self, unit: int, rows: int, seq: int) -> LayerCost:
        layer = self.lm.layers[unit]
        try:
            with self._fake:
                return _run_alone(self.lm, unit, (rows, seq)).cost(layer)
        except _ANYTHING as error:
            self._say(type(layer).__name__, error)
            try:
                return self._real_layer(unit, rows, seq)
            except _ANYTHING as real:
                raise UnsupportedError(
                    f"what {type(layer).__name__} takes in memory cannot be measured ({type(real).__name__}: {real}), "
                    "so budgets cannot be planned for it; leave them and the plan's other settings unset"
                ) from error

    def _real_layer(self, unit: int, rows: int, seq: int) -> LayerCost:
        """From runs on a few real tokens; where those do not grow alike, from a run on all of them.

        Weights are zeros, of which a system keeps one page for all.
        """
        lm = self._measured()
        layer = lm.layers[unit]
        hollow = _with_zeros(layer)
        try:
            with torch.random.fork_rng(devices=[]):
                runs = [_run_alone(lm, unit, shape) for shape in _SMALL]
                try:
                    return _grown(runs, _SMALL, (rows, seq)).cost(layer)
                except RuntimeError as error:
                    logger.warning("%s is run on %d x %d tokens: %s", type(layer).__name__, rows, seq, error)
                    return _run_alone(lm, unit, (rows, seq)).cost(layer)
        finally:
            for module, name, parameter in hollow:
                module._parameters[name] = parameter

    @torch.enable_grad()  # whoever plans may be in a block without
    def loss(self, positions: int) -> LossCost:
        """Head and loss with their gradient for a chunk of target positions."""
        try:
            with self._fake:
                return _loss_cost(self.lm, self._head_input, positions)
        except _ANYTHING as error:
            self._say("the loss", error)
        few, more = 16, 32
        like = torch.empty(self._head_input.shape, dtype=self._head_input.dtype)
        small, large = (_loss_cost(self._measured(), like, count) for count in (few, more))
        share = (positions - few) / (more - few)
        return LossCost(
            *(round(a + share * (b - a)) for a, b in ((small.peak, large.peak), (small.flops, large.flops)))
        )


def _around(lm: TransformersCausalLM) -> torch.Tensor:
    """What comes out of a model of one token without its layers."""
    bare = [lambda hidden, *_, **__: lm.pass_on(hidden)] * len(lm.layers)
    with lm.replaced_layers(bare), torch.no_grad():
        return lm.hidden_states(input_ids=torch.zeros((1, 1), dtype=torch.long))


def _loss_cost(lm: TransformersCausalLM, like: torch.Tensor, positions: int) -> LossCost:
    hidden = like.new_zeros(1, positions, like.shape[-1])
    targets = torch.zeros(1, positions, dtype=torch.long)
    with Counting() as live:
        loss_of_piece(lm, hidden, targets, 1.0, 1.0, True)
    return LossCost(peak=live.peak, flops=live.flops)


class _LayerRun:
    """A layer run forward without a graph, then with one and backward."""

    def __init__(self, layer: nn.Module, arguments: Arguments) -> None:
        like, rest = take_hidden(*arguments)
        with torch.no_grad(), Counting() as self.forward:
            layer(like, *rest[0], **rest[1])
        hidden = torch.empty_like(like).requires_grad_()
        gradient = torch.empty_like(like)
        wanted = [p for p in layer.parameters() if p.requires_grad]
        with Counting() as self.both:
            output = layer(hidden, *rest[0], **rest[1])
            self.graph = self.both.now
            self.turn = len(self.both.order)
            found = torch.autograd.grad(hidden_of(output), [hidden, *wanted], gradient, allow_unused=True)
        del output, found
        self.dtype = like.dtype

    def cost(self, layer: nn.Module) -> LayerCost:
        """In the plan's terms."""
        return LayerCost(
            forward_peak=self.forward.peak,
            graph=self.graph,
            backward_peak=self.both.peak,
            forward_flops=self.forward.flops,
            backward_flops=self.both.flops - self.forward.flops,
            kernel_scratch=0 if self.dtype is torch.float32 else max(p.nbytes for p in layer.parameters()),
        )


def _run_alone(lm: TransformersCausalLM, unit: int, shape: tuple[int, int]) -> _LayerRun:
    """A layer run with what the model hands to it; where it needs what layers before it return, they run as well.

    A row is padded, as it may be in training: then there is a mask, and attention takes more.
    """
    layer = lm.layers[unit]
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, 0] = 0
    arguments = layer_arguments(lm, unit, shape, attention_mask=mask)
    try:
        return _LayerRun(layer, arguments)
    except _ANYTHING:
        if not (lm.returns_several or containers(arguments)):
            raise
        return _LayerRun(layer, layer_arguments(lm, unit, shape, fed=True, attention_mask=mask))


def _grown(runs: Sequence[_LayerRun], shapes: Sequence[tuple[int, int]], shape: tuple[int, int]) -> _LayerRun:
    """A run at another shape: the bytes of every storage, and operations, are polynomials in rows and length, of degree
    1 and 2; when storages are made and freed is the same at all shapes.

    Raises:
        RuntimeError: it is not.
    """
    powers = torch.tensor([_powers(*each) for each in (*shapes, shape)], dtype=torch.float64)
    weights = torch.linalg.solve(powers[:-1].T, powers[-1])
    grown = copy.copy(runs[0])
    for name in ("forward", "both"):
        counts = [getattr(run, name) for run in runs]
        if any(count.order != counts[0].order for count in counts):
            raise RuntimeError("its way through memory depends on the length")
        total = copy.copy(counts[0])
        total.flops = round(float(weights @ torch.tensor([float(count.flops) for count in counts]).double()))
        sizes = weights @ torch.tensor([count.storages for count in counts], dtype=torch.float64)
        changes = [float(sizes[n]) if n >= 0 else -float(sizes[~n]) for n in total.order]
        alive = list(itertools.accumulate(changes, initial=0.0))
        total.peak = round(max(alive))
        setattr(grown, name, total)
        if name == "both":
            grown.graph = round(alive[grown.turn])
    return grown


def _powers(rows: int, length: int) -> list[int]:
    return [rows**i * length**j for i in (0, 1) for j in (0, 1, 2)]


def _grouped_shape(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None) -> tuple[int, ...]:
    """Of products of groups: rows of `a` (2 dimensions), columns of `b` (2), or both cut along what is summed."""
    if a.dim() == b.dim() == 2:
        assert ends is not None
        return (ends.shape[0], a.shape[0], b.shape[1])
    if a.dim() == b.dim() == 3:
        return (a.shape[0], a.shape[1], b.shape[2])
    return (a.shape[-2], b.shape[-1])


def _grouped_flops(a: torch.Tensor, b: torch.Tensor) -> int:
    groups = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return int(2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1])


def _attention_flops(*args: Any) -> int:
    """Two products forward; backward, where the output's gradient comes first, the scores again and four more."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4]
    backward = tensors[0].shape == tensors[1].shape and len(args) > 3 and isinstance(args[3], torch.Tensor)
    query, key, value = tensors[1:4] if backward else tensors[:3]
    batch, heads, length, width = query.shape
    one = 2 * batch * heads * length * key.shape[-2]
    return one * (3 * width + 2 * value.shape[-1] if backward else width + value.shape[-1])


def _with_lora(adapter: TransformersAdapter, lora: dict[str, Any] | None) -> int:
    """Give a model adapters without memory; how many parameters they have."""
    if lora is None:
        return 0
    manager = LoRAManager(lora, device="cpu")
    manager.attach(adapter, empty=True)
    return sum(parameter.numel() for parameter in manager.get_trainable_parameters())


def _with_zeros(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Give a layer real parameters; those it had."""
    before = []
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                before.append((module, name, parameter))
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
    return before


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
