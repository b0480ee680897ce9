"""What a decoder layer is called with: what may be passed through a recompute, and how rows are cut out.

It knows argument names and shapes; it knows nothing of what a layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..errors import UnsupportedError
from ..models.causal_lm import CausalLM
from .trees import changed, leaves, take_apart, writable

_SCALARS = (bool, int, float, str, torch.dtype, torch.device, type(None))

_OF_A_LAYER = "_lema_of_a_layer"
_HIDDEN = "hidden states"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Arguments]:
    """The hidden states a layer is called with, and the rest."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states that a layer returned, alone or before other things."""
    return take_apart(output)[1][0]


def named_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every argument under its name; items of containers one by one."""
    for i, value in enumerate(args, 1):
        yield from leaves(f"argument {i}", value)
    for name, value in kwargs.items():
        yield from leaves(name, value)


def changed_leaves(arguments: Arguments, change: Any) -> Arguments:
    """The arguments with other leaves, `change(name, leaf)`, in containers of their own."""
    args, kwargs = arguments
    return (
        tuple(changed(f"argument {i}", value, change) for i, value in enumerate(args, 1)),
        {name: changed(name, value, change) for name, value in kwargs.items()},
    )


def containers(arguments: Arguments) -> list[Any]:
    """Lists and dictionaries among the arguments, which a layer may write to."""
    args, kwargs = arguments
    return [container for value in (*args, *kwargs.values()) for container in writable(value)]


def of_a_layer(value: Any) -> Any:
    """What a layer made beside its hidden states, so marked: of it a later layer gets the rows it computes, which
    are the first dimension, as they are of all that layers make."""
    if isinstance(value, torch.Tensor):
        setattr(value, _OF_A_LAYER, True)
    return value


def is_of_a_layer(value: torch.Tensor) -> bool:
    """Whether a layer made it."""
    return bool(getattr(value, _OF_A_LAYER, False))


def holds_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a key-value cache is among the arguments."""
    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))


def check_replayable(layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what a second run of the layer would not see as the first did.

    Raises:
        UnsupportedError: a cache, or an object that is neither a tensor, a number nor a container of them.
    """
    for name, value in named_leaves(args, kwargs):
        if isinstance(value, Cache):
            raise UnsupportedError(
                f"{layer} was given a key-value cache ({name}) while gradients are on; its recompute would see a "
                "different cache and give wrong gradients. Pass use_cache=False, or wrap the call in torch.no_grad()"
            )
        if not isinstance(value, (torch.Tensor, *_SCALARS)):
            raise UnsupportedError(
                f"{layer} was given {name}, a {type(value).__name__}: the layer could write to it, and its recompute "
                "would see what later layers wrote. This model is not supported"
            )


@dataclass(slots=True)
class BatchRules:
    """Which dimension of which named argument is the batch, learned from the model itself.

    The model's own forward is run on two batch sizes; what grows with the batch is cut, what does not is
    handed on whole, however its sizes look at run time.
    """

    dims: dict[tuple[str, int], int | None] = field(default_factory=dict)
    """(name, number of dimensions) -> batch dimension, None where the argument does not depend on the batch."""

    @classmethod
    def learn(cls, lm: CausalLM) -> BatchRules:
        """Run the model without its layers on batches of 2 and 3.

        Raises:
            UnsupportedError: an argument changes with the batch in another way than by its size in one dimension.
        """
        rules = cls()
        for with_mask in (False, True):
            for with_positions in (False, True):
                small = _record(lm, 2, with_mask, with_positions)
                large = _record(lm, 3, with_mask, with_positions)
                for key in small.keys() & large.keys():
                    rules._add(key, small[key], large[key])
        return rules

    def _add(self, key: tuple[str, int], small: tuple[int, ...], large: tuple[int, ...]) -> None:
        changed = [d for d, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
        if not changed:
            self.dims.setdefault(key, None)
            return
        (dim,) = changed if len(changed) == 1 else (None,)
        known = self.dims.get(key)
        if dim is None or (small[dim], large[dim]) != (2, 3) or known not in (None, dim):
            raise UnsupportedError(
                f"layer argument {key[0]!r} has shape {list(small)} for 2 rows and {list(large)} for 3: it cannot be "
                "cut into micro-batches. Use micro_batch_size=None"
            )
        self.dims[key] = dim

    def of_hidden(self, hidden: torch.Tensor) -> int:
        """The batch dimension of the hidden states that layers are given; `UnsupportedError` if there is none."""
        dim = self.dims.get((_HIDDEN, hidden.dim()))
        if dim is None:
            raise UnsupportedError(
                f"hidden states of shape {list(hidden.shape)} have no dimension of rows that LEMA can tell. "
                "Use micro_batch_size=None"
            )
        return dim

    def of_argument(self, name: str, value: torch.Tensor, batch: int) -> int | None:
        """The batch dimension of an argument; None where every micro-batch gets all of it.

        Raises:
            UnsupportedError: the model does not pass such a one by itself, or it has other rows than the batch.
        """
        key = (name, value.dim())
        made = key not in self.dims and is_of_a_layer(value)
        if key not in self.dims and not made:
            raise UnsupportedError(
                f"layer argument {name!r} of shape {list(value.shape)} is not one the model passes by itself, so "
                "LEMA cannot tell its batch dimension. Use micro_batch_size=None"
            )
        dim = 0 if made else self.dims[key]
        if dim is None or (value.shape[dim] == 1 and not made):
            return None
        if value.shape[dim] != batch:
            raise UnsupportedError(
                f"layer argument {name!r} has {value.shape[dim]} rows for a batch of {batch}. Use micro_batch_size=None"
            )
        return dim

    def rows(self, arguments: Arguments, batch: int, start: int, end: int) -> Arguments:
        """The arguments for rows `start`..`end` of a batch."""

        def cut(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            dim = self.of_argument(name, value, batch)
            return value if dim is None else value.narrow(dim, start, end - start)

        return changed_leaves(arguments, cut)


def _record(lm: CausalLM, batch: int, with_mask: bool, with_positions: bool) -> dict[tuple[str, int], tuple[int, ...]]:
    """Shapes of every tensor the layers are called with, for a batch of this many rows of 5 tokens."""
    shapes: dict[tuple[str, int], tuple[int, ...]] = {}

    def note(*args: Any, **kwargs: Any) -> Any:
        hidden, rest = take_hidden(args, kwargs)
        for name, value in ((_HIDDEN, hidden), *named_leaves(*rest)):
            if isinstance(value, torch.Tensor):
                shapes[name, value.dim()] = tuple(value.shape)
        return lm.pass_on(hidden)

    device = getattr(lm.module, "device", torch.device("cpu"))
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.zeros((batch, 5), dtype=torch.long, device=device)}
    if with_mask:
        mask = torch.ones((batch, 5), dtype=torch.long, device=device)
        mask[:, -1] = 0
        inputs["attention_mask"] = mask
    if with_positions:
        inputs["position_ids"] = torch.arange(5, device=device).repeat(batch, 1)
    with lm.replaced_layers([note] * len(lm.layers)), torch.no_grad(), torch.random.fork_rng(devices=[]):
        lm.run_decoder(**inputs)
    return shapes
