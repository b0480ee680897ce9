"""Packed rows: whether a model keeps rows apart that lie one after the other in one sequence.

It knows what a model hands to its layers; it knows nothing of text or of how rows are packed.

Rows are told apart by `position_ids` that restart, without an `attention_mask`: transformers builds a block-diagonal
mask from them, but not for every family. Some build their masks without looking at positions, some mix tokens without
a mask (linear attention, convolutions, state spaces), flash attention gets no mask at all. So the model is asked: its
own forward is run on two rows packed and on the second alone, with the layers replaced, and what the layers would get
is compared. A layer without a mask that shuts out the other row means that rows would leak into each other.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..errors import UnsupportedError
from ..models.causal_lm import CausalLM
from ..models.skeleton import replaced_forwards
from .arguments import named_leaves

_FIRST, _SECOND = 5, 6
_known: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Of models asked before, what is wrong with packing; an empty text if nothing is."""

_Seen = dict[tuple[int, str], torch.Tensor]


def is_packed(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> bool:
    """Whether a batch has several rows in one sequence: positions that restart, and no mask."""
    return attention_mask is None and position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())


def check_packing(lm: CausalLM) -> None:
    """Refuse a model that would let packed rows see each other.

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


def _fault(lm: CausalLM) -> str:
    """Why rows would not be kept apart; empty if they are."""
    first, second = torch.arange(_FIRST), torch.arange(_SECOND)
    packed = _seen_by_layers(lm, torch.cat((first, second)))
    alone = _seen_by_layers(lm, second)
    for number in range(len(lm.layers)):
        masks = [value for (layer, _), value in packed.items() if layer == number and _is_mask(value)]
        if not masks:
            return f"its layer {number} is given no attention mask"
        if not all(_shuts_out(mask) for mask in masks):
            return f"the attention mask of its layer {number} does not follow positions that restart"
    for key, value in alone.items():
        whole = packed.get(key)
        if whole is not None and not _is_mask(value) and not _same_positions(whole, value):
            return f"what its layer {key[0]} is given as {key[1]} does not restart with the positions"
    return ""


def _seen_by_layers(lm: CausalLM, positions: torch.Tensor) -> _Seen:
    """Every tensor each layer is given for one sequence, its hidden states included."""
    seen: _Seen = {}
    lm.pass_on(torch.empty(0))  # learned before the layers are replaced

    def note(number: int) -> Any:
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for name, value in (("hidden states", hidden), *named_leaves(args, kwargs)):
                if isinstance(value, torch.Tensor):
                    seen[number, name] = value.detach()
            return lm.pass_on(hidden)

        return forward

    device = getattr(lm.module, "device", torch.device("cpu"))
    inputs = {"input_ids": positions[None].to(device), "position_ids": positions[None].to(device)}
    training = lm.module.training
    lm.module.eval()  # dropout on the embeddings would differ from one run to the next
    try:
        with replaced_forwards(lm.layers, [note(i) for i in range(len(lm.layers))]), torch.no_grad():
            lm.module.forward(**inputs, use_cache=False)
    finally:
        lm.module.train(training)
    return seen


def _is_mask(value: torch.Tensor) -> bool:
    return value.dim() == 4 and value.shape[-1] == value.shape[-2]


def _shuts_out(mask: torch.Tensor) -> bool:
    """Whether the second row sees nothing of the first, and something of itself."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    own = seen[..., _FIRST:, _FIRST:].diagonal(dim1=-2, dim2=-1)
    return bool(own.all()) and not bool(seen[..., _FIRST:, :_FIRST].any())


def _same_positions(whole: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether the part of the second row, along the axis that is tokens, is what it is alone."""
    axes = [d for d, (a, b) in enumerate(zip(whole.shape, alone.shape)) if (a, b) == (_FIRST + _SECOND, _SECOND)]
    if whole.dim() != alone.dim() or not axes:
        return True
    part = whole.narrow(axes[0], _FIRST, _SECOND)
    return torch.allclose(part.float(), alone.float(), rtol=1e-3, atol=1e-3)
