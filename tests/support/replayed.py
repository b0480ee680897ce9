"""A layer whose input is kept by a store and whose backward runs it again."""

from __future__ import annotations

from typing import Any

import torch

from lema.streaming.boundaries import BoundaryStore


class Replayed(torch.autograd.Function):
    """A layer whose input is kept by a store and whose backward runs it again, as the engine's does."""

    @staticmethod
    def forward(ctx: Any, store: BoundaryStore, unit: int, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.store, ctx.weight = store, weight
        store.save(ctx, unit, hidden)
        return layer(hidden, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        weight = ctx.weight.detach().requires_grad_()
        with ctx.store.saved(ctx) as kept:
            hidden = kept.detach().requires_grad_()
            with torch.enable_grad():
                output = layer(hidden, weight)
            return None, None, *torch.autograd.grad(output, (hidden, weight), gradient)


def layer(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(hidden @ weight) + hidden
