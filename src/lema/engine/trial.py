"""A model tried before it is trained: whether its loss and its gradients outside the layers are what its own forward
gives.

It knows how to run a model on a few tokens with stand-ins for its layers and its head, so that no weight of theirs is
needed; it knows nothing of files, memory or steps.

Layers compute their own gradients by construction: autograd is asked for every trained parameter of a layer; where
there is none to be had, as for what only chooses positions, `Attachment` says so after a step. What a family does
around them is its own affair: modules between decoder and head, a loss with more in it than the tokens', adapters on
modules that text does not reach. So the same few tokens go through the model's own `forward(labels=...)` and through
the two halves that a step is made of, the loss in one piece and in chunks, and all must agree.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import LemaError, UnsupportedError
from ..models.causal_lm import CausalLM
from ..models.trained import trained_outside
from ..streaming.arguments import named_leaves, take_hidden
from ..streaming.randomness import RandomState
from .loss.positions import IGNORE_INDEX, compute_loss, shift_left

_ROWS, _LENGTH = 2, 6
_CHUNK = 3
_LOSS = 1e-5
"""Both ways run the same operations on the same logits; only the division by the targets may come elsewhere."""
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError)
"""What code of a model can raise where it is run on values that it is not made for."""
Gradients = Sequence[torch.Tensor | None]


def fault_of_training(lm: CausalLM) -> str:
    """Why a model with its adapters would not be trained rightly; empty if it would."""
    outside = trained_outside(lm.module, lm.layers)
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in outside.values()):
        return ""  # no gradient can be had at all, which a step says
    family = type(lm.module).__name__
    try:
        with _tried(lm) as batch:
            return _compared(lm, family, outside, batch)
    except LemaError as error:
        return str(error)
    except _FAILURES as error:
        return f"{family} cannot be tried on a few tokens ({type(error).__name__}: {error})"


def check_training(fault: str) -> None:
    """Raise `UnsupportedError` with what `fault_of_training` found, if anything."""
    if fault:
        raise UnsupportedError(f"{fault}. It can be asked, and not trained")


def _compared(lm: CausalLM, family: str, outside: dict[str, nn.Parameter], batch: dict[str, torch.Tensor]) -> str:
    device = batch["input_ids"].device
    wanted = list(outside.values())
    state = RandomState.now(device)
    with state.replayed():
        loss: torch.Tensor = lm.module(**batch, use_cache=False).loss
        own, own_loss = _gradients([(loss, None)], wanted), float(loss.detach())
    if unused := [name for name, gradient in zip(outside, own, strict=True) if gradient is None]:
        return (
            f"nothing that {family} computes of text uses {_listed(unused)}, so an adapter there would get no "
            "gradient; leave it out with exclude_modules"
        )
    targets = shift_left(batch["labels"])
    count = float((targets != IGNORE_INDEX).sum())
    for chunk in (None, _CHUNK):
        with state.replayed():
            hidden = lm.hidden_states(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            result = compute_loss(lm, hidden, targets, count, chunk_size=chunk, trained=wanted)
            beside = {id(parameter): gradient for parameter, gradient in result.beside}
            found = _gradients([(hidden, result.gradient)], wanted)
        if abs(result.loss - own_loss) > _LOSS * abs(own_loss):
            return (
                f"the loss of {family} is not that of the next tokens alone: its own forward says "
                f"{own_loss:.6g}, the tokens {result.loss:.6g} on the same logits{_settings_of_loss(lm)}"
            )
        found = [_added(g, beside.get(id(p))) for g, p in zip(found, wanted, strict=True)]
        if lost := [n for n, a, b in zip(outside, own, found, strict=True) if not _alike(a, b)]:
            return f"{_listed(lost)} of {family} would get another gradient than from its own forward"
    return ""


def _gradients(outputs: list[tuple[torch.Tensor, torch.Tensor | None]], wanted: list[nn.Parameter]) -> Gradients:
    pairs = [(output, gradient) for output, gradient in outputs if output.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)


def _added(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return one if other is None else other if one is None else one + other


def _alike(own: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    if own is None or found is None:
        return own is found
    rounding = 1e-3 if own.dtype is torch.float32 else 0.1
    difference = (own - found).float().nan_to_num()  # where its own is NaN there is nothing to be compared
    return bool(difference.norm() <= rounding * own.float().nan_to_num().norm() + 1e-12)


def kinds_of(names: Iterable[str]) -> set[str]:
    """Modules that parameters of adapters belong to, alike in all layers and for one of several experts."""
    return {re.sub(r"\.\d+(?=\.|$)", ".*", re.split(r"\.lora_", name)[0]) for name in names}


def _listed(names: list[str]) -> str:
    modules = list(dict.fromkeys(re.split(r"\.lora_|\.base_layer", name)[0] for name in names))
    return ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")


def _settings_of_loss(lm: CausalLM) -> str:
    """Entries of the configuration that may be what a loss has beside the tokens'."""
    config = getattr(lm.module, "config", None)
    values: dict[str, Any] = config.to_dict() if config is not None else {}
    found = [f"{k}: {v}" for k, v in values.items() if "loss" in k and isinstance(v, float | int) and v]
    return f" ({', '.join(found)} in its configuration; 0 there trains on the tokens alone)" if found else ""


@contextlib.contextmanager
def _tried(lm: CausalLM) -> Iterator[dict[str, torch.Tensor]]:
    """Inside the block layers and head are stand-ins, and gradients can be had: a batch to run."""
    device = getattr(lm.module, "device", torch.device("cpu"))
    length = min(_LENGTH, lm.max_positions or _LENGTH)
    ids = torch.arange(_ROWS * length).view(_ROWS, length) % (lm.vocab_size - 1) + 1
    mask = torch.ones_like(ids)
    mask[1, length - length // 3 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE_INDEX)}
    head = lm.head
    heads, forwards = ([head], [_head(head)]) if type(head) is nn.Linear else ([], [])
    training = lm.module.training
    lm.module.train()
    passing = [_layer(lm)] * len(lm.layers)
    try:
        with (
            lm.replaced_layers(passing), lm.interceptor.replaced(heads, forwards), torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):  # fmt: skip
            yield {name: value.to(device) for name, value in batch.items()}
    finally:
        lm.module.train(training)


def _layer(lm: CausalLM) -> Any:
    """Hands its hidden states on, and lets a gradient reach whatever else it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, rest = take_hidden(args, kwargs)
        for _, value in named_leaves(*rest):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                hidden = hidden + value.mean().to(hidden.dtype)
        return lm.pass_on(hidden)

    return forward


def _head(head: nn.Linear) -> Any:
    """As many outputs as the head has, each one of its inputs."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        numbers = torch.arange(head.out_features, device=x.device) % head.in_features
        return x.index_select(-1, numbers)

    return forward
