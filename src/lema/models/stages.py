"""One layer of a transformers model run alone, by the model's own forward with its layers replaced.

It knows what surrounds the layers; it knows nothing of weights' places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .causal_lm import TransformersCausalLM
from .interceptor import Forward
from .skeleton import stand_in_ids


class _Reached(BaseException):
    """Ends a forward at a layer; not an error, so nothing on the way may take it for one."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.layer_args, self.layer_kwargs = args, kwargs


def _reach(*args: Any, **kwargs: Any) -> Any:
    raise _Reached(args, kwargs)


def layer_arguments(
    lm: TransformersCausalLM, unit: int, shape: Sequence[int], fed: bool = False, **inputs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model's own forward hands to a layer for a batch of this `[batch, seq]`.

    Args:
        fed: run the layers before it, and hand on what they return beside their hidden states.
    """
    before = _feeding if fed else _passing
    forwards = [_reach if i == unit else before(lm, i) for i in range(len(lm.layers))]
    ids = stand_in_ids(lm.module, *shape)
    with lm.replaced_layers(forwards), torch.no_grad():
        try:
            lm.module.forward(input_ids=ids, use_cache=False, **inputs)  # no hook may see a forward that does not end
        except _Reached as reached:
            return reached.layer_args, reached.layer_kwargs
    raise UnsupportedError(
        f"{type(lm.module).__name__} does not call layer {unit} in its forward, so what the layer is given is not known"
    )


def _passing(lm: TransformersCausalLM, number: int) -> Forward:
    return lambda hidden, *_, **__: lm.pass_on(hidden)


def _feeding(lm: TransformersCausalLM, number: int) -> Forward:
    layer = lm.layers[number]

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = type(layer).forward(layer, hidden, *args, **kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else output

    return run


class EmbeddingStage(nn.Module):
    """The model's forward up to its first layer."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, lm: TransformersCausalLM) -> None:
        super().__init__()
        self.model = model
        self._layers: Any
        self._lm: TransformersCausalLM
        self.__dict__.update(_layers=layers, _lm=lm)  # not submodules of their own

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Ids `[batch, seq]` -> hidden states `[batch, seq, hidden]`."""
        with self._lm.interceptor.replaced(self._layers, [_reach] * len(self._layers)):
            try:
                self.model(input_ids=input_ids, use_cache=False, **kwargs)
            except _Reached as reached:
                hidden = reached.layer_args[0] if reached.layer_args else reached.layer_kwargs["hidden_states"]
                return hidden
        raise UnsupportedError(f"{type(self.model).__name__} calls none of its layers in its forward")


class HeadStage(nn.Module):
    """The model's forward after its last layer."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, lm: TransformersCausalLM) -> None:
        super().__init__()
        self.model = model
        self._layers: Any
        self._lm: TransformersCausalLM
        self.__dict__.update(_layers=layers, _lm=lm)  # not submodules of their own

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Hidden states `[batch, seq, hidden]` -> logits `[batch, seq, vocab]`."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        output = self._lm.pass_on(hidden)
        with self._lm.interceptor.replaced(self._layers, [lambda *_, **__: output] * len(self._layers)):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, **kwargs).logits
        return logits


def split_rest(
    lm: TransformersCausalLM,
    names: Sequence[str],
    places: Mapping[str, tuple[nn.Module, str]],
) -> tuple[list[str], list[str]]:
    """Names outside the layers, split into those used before the first layer and those used after the last."""
    passed = False
    after: set[int] = set()

    def last(hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        nonlocal passed
        passed = True
        return lm.pass_on(hidden)

    def note(module: nn.Module, *_: Any) -> None:
        if passed:
            after.add(id(module))

    handles = [module.register_forward_pre_hook(note) for module in {places[name][0] for name in names}]
    forwards = [_passing(lm, i) for i in range(len(lm.layers) - 1)] + [last]
    try:
        with lm.replaced_layers(forwards), torch.no_grad():
            lm.module(input_ids=stand_in_ids(lm.module, 1, 1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    head = [name for name in names if id(places[name][0]) in after]
    return [name for name in names if name not in head], head
