"""A head whose weight comes and goes, whole or in pieces: what the engine's loss asks of memory, and what stands in for
its forward where anything else calls it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ...machine.heap import HeapGuard
from ...streaming.arguments import BatchRules
from ...streaming.draws import Draws
from ...streaming.layer_call import Batching
from ...streaming.recompute import StreamedLayer
from ...streaming.weight_store import WeightStore
from .vocabulary import Head, HeadPieces


def head_pieces(memory: WeightStore) -> HeadPieces | None:
    """The head's weight by runs of vocabulary rows, where it is never there whole."""
    return memory.head_chunks


def head_held(memory: WeightStore) -> AbstractContextManager[None]:
    """The head's weight is there inside the block, wherever it is else."""
    return memory.use(memory.head_unit)


def streamed_forward(head: nn.Module, memory: WeightStore) -> Callable[..., Any] | None:
    """What stands in for the forward of a head; None where its weight stays."""
    pieces = head_pieces(memory)
    if pieces is None or not isinstance(head, nn.Linear):
        return StreamedHead(head, memory) if memory.streams_head else None
    pieced = Head(head, pieces)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.numel() == 0:
            return hidden.new_empty(*hidden.shape[:-1], pieced.linear.out_features)
        logits: torch.Tensor = _PiecedLinear.apply(hidden, pieced)
        return logits

    return forward


class StreamedHead(StreamedLayer):
    """A head whose weight comes and goes. While the engine holds it, as it does from the first chunk of logits
    to the last chunk's gradient, it is an ordinary layer; else it is replayed like the others."""

    def __init__(self, head: nn.Module, memory: WeightStore) -> None:
        super().__init__(memory.head_unit, head, memory, Batching(None, BatchRules), HeapGuard(None), Draws())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.memory.holds_head or (args and args[0].numel() == 0):
            return self._forward(self.module, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class _PiecedLinear(torch.autograd.Function):
    """Logits piece by piece; the gradient of the hidden states takes a second pass over the pieces."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head) -> torch.Tensor:
        ctx.pieces, ctx.like = head.pieces, hidden.new_empty(0)
        return head(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total: torch.Tensor | None = None
        for number, (start, end) in enumerate(ctx.pieces.ranges):
            with ctx.pieces.use(number) as weight:
                part = gradient[..., start:end] @ weight.to(gradient.dtype)
            total = part if total is None else total.add_(part)
        assert total is not None, "a head without rows"
        return total.to(ctx.like.dtype), None
