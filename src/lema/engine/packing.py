"""Packed rows: whether a model keeps rows apart that lie one after the other in one sequence.

It knows how to try a model's layers on a few tokens; it knows nothing of text or of how rows are packed.

Rows are told apart by `position_ids` that restart, without an `attention_mask`: transformers builds a block-diagonal
mask from them, but not for every family. Some build their masks without looking at positions, some mix tokens without
a mask (linear attention, convolutions, state spaces) even where they are given one, flash attention looks at
positions only where a batch has one row. So the model is tried: its own forward prepares two packs of two rows, and
the second rows alone; one layer of each kind computes both, on random values and random weights (all layers do, one
after the other, where later ones need what earlier ones made). Where a row is not what it is alone, rows leak into
each other. A weight is as many random numbers as its sides are long, laid out along both, so a layer of any size
takes the memory of its largest matrix and no file is read.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..models.causal_lm import CausalLM
from ..streaming.arguments import Arguments, changed_leaves, containers, hidden_of, named_leaves, take_hidden

_CUTS = ((5, 6), (4, 7))
"""Tokens of the rows of each pack."""
_ROUNDING = 1e-4
"""What the order of sums may change of float32 values around 1; a row that leaks moves some by a hundred times that."""
_ROUNDING_OF_DEVICES = 5e-3
_ROUNDING_OF_HALF = 5e-2
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError)
"""What code of a model can raise where it is run on values that it is not made for."""
_known: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Of models asked before, what is wrong with packing; an empty text if nothing is."""


def is_packed(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> bool:
    """Whether a batch has several rows in one sequence: positions that restart, and no mask."""
    return attention_mask is None and position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())


def check_packing(lm: CausalLM) -> None:
    """Refuse a model that would let packed rows see each other. Its weights are not read, and need not be there.

    Raises:
        UnsupportedError: names the model and what it does.
    """
    if lm not in _known:
        _known[lm] = _fault(lm)
    if fault := _known[lm]:
        family = type(lm.module).__name__
        raise UnsupportedError(
            f"{family} cannot train on packed rows: {fault}, so rows in one sequence would see each other. "
            "Set packing: false"
        )


def take_over_packing(lm: CausalLM, tried: CausalLM) -> None:
    """What was found of a model holds for another one made by the same settings, so that a run tries its own once."""
    if tried in _known:
        _known[lm] = _known[tried]


class _Enough(BaseException):
    """Ends a forward before its head, which would be most of the work; not an error, so nothing takes it for one."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What a layer was called with."""

    hidden: torch.Tensor
    arguments: Arguments

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Arguments that are tensors, by name."""
        return [(name, value) for name, value in named_leaves(*self.arguments) if isinstance(value, torch.Tensor)]


def _fault(lm: CausalLM) -> str:
    """Why rows would not be kept apart; empty if they are."""
    try:
        packs = _calls(lm, [torch.cat([torch.arange(n) for n in cut]) for cut in _CUTS])
        alone = [_calls(lm, [torch.arange(second)]) for _, second in _CUTS]
    except _FAILURES as error:
        return f"it cannot be tried on them ({type(error).__name__}: {error})"
    for pack, (first, second) in enumerate(_CUTS):
        together = _rows_first(packs[0].hidden, sum(_CUTS[0]))[pack, first:]
        if _differ(together, _rows_first(alone[pack][0].hidden, second)[0]):
            return "what its first layer is given does not restart with the positions"
    if lm.returns_several or any(containers(call.arguments) for call in packs):
        return _fault_of_all(lm, packs[0].hidden)
    for number in _kinds(lm, packs):
        try:
            leaks = _leaks(lm, number, packs[number], [calls[number] for calls in alone])
        except _FAILURES as error:
            return f"its layer {number} cannot be tried on them ({type(error).__name__}: {error})"
        if leaks:
            return _of_layer(lm, number)
    return ""


def _of_layer(lm: CausalLM, number: int) -> str:
    return f"in its layer {number} ({type(lm.layers[number]).__name__}) a row changes with the row before it"


def _fault_of_all(lm: CausalLM, hidden: torch.Tensor) -> str:
    """Why rows would not be kept apart by layers that need what earlier ones made, so that all run in their order; the
    first is given random values shaped like these hidden states of the packs."""
    half = lm.module.dtype not in (torch.float32, torch.float64)
    device = getattr(lm.module, "device", torch.device("cpu"))
    tolerance = _ROUNDING_OF_HALF if half else _ROUNDING if device.type == "cpu" else _ROUNDING_OF_DEVICES
    try:
        with _in_full(device.type):
            shape = _rows_first(hidden, sum(_CUTS[0])).shape
            values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(hidden)
            packs = _outputs(lm, [torch.cat([torch.arange(n) for n in cut]) for cut in _CUTS], values)
            alone = [
                _outputs(lm, [torch.arange(second)], values[pack : pack + 1, first:])
                for pack, (first, second) in enumerate(_CUTS)
            ]
    except _FAILURES as error:
        return f"its layers cannot be tried on them ({type(error).__name__}: {error})"
    for number, outputs in enumerate(packs):
        for pack, (first, second) in enumerate(_CUTS):
            together = _rows_first(outputs, sum(_CUTS[0]))[pack, first:]
            if _differ(together, _rows_first(alone[pack][number], second)[0], tolerance):
                return _of_layer(lm, number)
    return ""


def _outputs(lm: CausalLM, positions: list[torch.Tensor], values: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states after each layer for a batch of these positions, the first layer being given `[batch, seq, ..]`."""
    found: list[torch.Tensor] = []

    def runs(layer: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = take_hidden(args, kwargs)
            if not found:
                seq = _seq_dim(hidden, values.shape[1])
                hidden = values.movedim((0, 1), (seq - 1, seq)).contiguous()
            with _tried(layer, hidden.dtype):
                output = type(layer).forward(layer, hidden, *rest[0], **rest[1])
            found.append(hidden_of(output))
            if len(found) == len(lm.layers):
                raise _Enough
            return output

        return forward

    _forward(lm, [runs(layer) for layer in lm.layers], positions)
    return found


def _rows_first(hidden: torch.Tensor, length: int) -> torch.Tensor:
    """Hidden states as `[batch, seq, ..]`, where the family has another dimension before them."""
    seq = _seq_dim(hidden, length)
    return hidden.movedim((seq - 1, seq), (0, 1))


def _seq_dim(hidden: torch.Tensor, length: int) -> int:
    return next(d for d in range(1, hidden.dim()) if hidden.shape[d] == length)


def _calls(lm: CausalLM, positions: list[torch.Tensor]) -> list[_Call]:
    """What each layer is called with for a batch of these positions, the layers themselves left out."""
    calls: dict[int, _Call] = {}

    def note(number: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[number] = _Call(*take_hidden(args, kwargs))
            if number == len(lm.layers) - 1:
                raise _Enough
            return lm.pass_on(calls[number].hidden)

        return forward

    _forward(lm, [note(i) for i in range(len(lm.layers))], positions)
    return [calls[number] for number in range(len(lm.layers))]


def _forward(lm: CausalLM, forwards: list[Any], positions: list[torch.Tensor]) -> None:
    """The model's own forward with these in place of its layers', up to the last."""
    rows = torch.stack(positions).to(getattr(lm.module, "device", torch.device("cpu")))
    training = lm.module.training
    lm.module.eval()  # dropout on the embeddings would differ from one run to the next
    try:
        with lm.replaced_layers(forwards), torch.no_grad():
            lm.module.forward(input_ids=rows, position_ids=rows, use_cache=False)
    except _Enough:
        pass
    finally:
        lm.module.train(training)


def _kinds(lm: CausalLM, calls: list[_Call]) -> list[int]:
    """One layer of each kind: made of the same parts with the same settings, and given the same."""
    kinds: dict[Any, int] = {}
    for number, layer in enumerate(lm.layers):
        parts = tuple(
            (name, type(module), tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)))
            + tuple((key, value) for key, value in vars(module).items() if _is_setting(value, number))
            for name, module in layer.named_modules()
        )
        given = tuple((name, _bytes(value)) for name, value in calls[number].tensors())
        kinds.setdefault((parts, given), number)
    return list(kinds.values())


def _is_setting(value: Any, number: int) -> bool:
    """Whether an attribute may tell layers apart; a layer's own number does not."""
    return isinstance(value, str | bool | float) or (isinstance(value, int) and value != number)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b""


def _leaks(lm: CausalLM, number: int, packs: _Call, alone: list[_Call]) -> bool:
    """Whether the second rows of the packs come out of a layer as others than alone."""
    layer = lm.layers[number]
    half = getattr(getattr(lm.module, "config", None), "_attn_implementation", "").startswith("flash")
    dtype = packs.hidden.dtype if half else torch.float32
    device = packs.hidden.device
    tolerance = _ROUNDING_OF_HALF if half else _ROUNDING if device.type == "cpu" else _ROUNDING_OF_DEVICES
    random = torch.Generator().manual_seed(number)
    hidden = torch.randn(packs.hidden.shape, generator=random).to(device, dtype)
    with _tried(layer, dtype), _in_full(device.type), torch.no_grad():
        together = _run(layer, hidden, packs.arguments)
        for pack, (first, _) in enumerate(_CUTS):
            single = _run(layer, hidden[pack : pack + 1, first:].contiguous(), alone[pack].arguments)
            if _differ(together[pack, first:], single[0], tolerance):
                return True
    return False


@contextmanager
def _in_full(device: str) -> Iterator[None]:
    """Inside the block matmuls of float32 are not made in fewer bits, whatever is set outside."""
    # Once one of these was set, torch refuses to say what the older setting is, which they stand for as well.
    kinds = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    places = [kind for kind in kinds if hasattr(kind, "fp32_precision")]
    before = [place.fp32_precision for place in places]  # type: ignore[union-attr]
    older = None if places else torch.get_float32_matmul_precision()
    for place in places:
        place.fp32_precision = "ieee"  # type: ignore[union-attr]
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value  # type: ignore[union-attr]
        if older is not None:
            torch.set_float32_matmul_precision(older)


def _run(layer: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    """A layer's hidden states, floating arguments cast to the type of those it gets."""

    def cast(_: str, value: Any) -> Any:
        return value.to(hidden.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args, kwargs = changed_leaves(arguments, cast)
    output = type(layer).forward(layer, hidden, *args, **kwargs)
    return hidden_of(output)


@contextmanager
def _tried(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block a layer has random weights, and draws nothing."""
    random = torch.Generator().manual_seed(0)
    before, training = [], layer.training
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                before.append((module, name, parameter))
                kind = dtype if parameter.is_floating_point() else parameter.dtype
                value = _random(parameter.shape, random, parameter.device, kind)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    layer.eval()
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter
        layer.train(training)


def _random(shape: torch.Size, random: torch.Generator, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers in little memory: element `[i, j]` is number `i + j` of one row. Of more than two sides the last
    two lie as kernels ask for, and are the same along the others."""
    if len(shape) > 2:
        return (torch.randn(shape[-2:], generator=random) * shape[-1] ** -0.5).to(device, dtype).expand(shape)
    scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.5
    row = torch.randn(sum(shape) + 1, generator=random) * scale
    return row.to(device, dtype).as_strided(shape, [1] * len(shape))


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float = _ROUNDING) -> bool:
    return not torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)
