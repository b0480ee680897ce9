"""An optimizer's settings, and where its state lies in host memory.

It knows groups and state tensors by parameter; it knows nothing of update rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import ConfigError
from ..machine.heap import give_back_idle_heap
from ..storage.views import copy_to_own_pages

_MOVED_BYTES = 16 << 20


def default_optimizer(parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over the parameters; over an empty one where there are none."""
    return torch.optim.AdamW(list(parameters) or [nn.Parameter(torch.empty(0))], lr=learning_rate)


def check_optimizer(optimizer: torch.optim.Optimizer, own: Sequence[nn.Parameter], kind: str) -> None:
    """`ConfigError` if there are parameters, of this kind, and the optimizer holds none of them."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if own and not any(id(p) in held for p in own):
        raise ConfigError(
            f"the optimizer holds none of the model's {kind}; make it from get_trainable_parameters() of "
            "this model, after initialize_lora()"
        )


def keep_state_apart(optimizer: torch.optim.Optimizer) -> None:
    """Move the state off the heap that activations use, each parameter's tensors together.

    Optimizers make their state in the first step, in the holes the backward left; there it would keep
    the heap in pieces for the rest of the run. Values do not change. What has moved goes back to the system
    as it goes, so that the state is never there twice.
    """
    moved = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.is_contiguous():
                state[key] = copy_to_own_pages(value)
                moved += value.nbytes if state[key] is not value else 0
                del value
            if moved >= _MOVED_BYTES:
                give_back_idle_heap(moved)
                moved = 0
    give_back_idle_heap()


def scale_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's learning rate to the one it began with times a factor; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def set_adamw(
    optimizer: torch.optim.Optimizer, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Give every group of an AdamW these settings."""
    for group in optimizer.param_groups:
        group.update(initial_lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
