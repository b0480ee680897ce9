"""A head whose weight comes and goes, whole or in pieces, as anything but the engine's own loss calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...streaming.arguments import BatchRules
from ...streaming.memory import TripleBufferManager
from ...streaming.recompute import Batching, StreamedLayer
from .vocabulary import HeadChunks, chunked_linear


class StreamedHead(StreamedLayer):
    """A head whose weight comes and goes. While the engine holds it, as it does from the first chunk of logits
    to the last chunk's gradient, it is an ordinary layer; else it is replayed like the others."""

    def __init__(self, head: nn.Module, memory: TripleBufferManager) -> None:
        super().__init__(memory.head_unit, head, memory, Batching(None, BatchRules))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.memory.holds_head or (args and args[0].numel() == 0):
            return self._forward(self._layer, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class ChunkedHead:
    """Stands in for the forward of a head that is never there whole, outside of the engine's own loss."""

    def __init__(self, head: nn.Linear, chunks: HeadChunks) -> None:
        self._head = head
        self._chunks = chunks

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.numel() == 0:
            return hidden.new_empty(*hidden.shape[:-1], self._head.out_features)
        logits: torch.Tensor = _ChunkedLinear.apply(hidden, self._head, self._chunks)
        return logits


class _ChunkedLinear(torch.autograd.Function):
    """Logits chunk by chunk; the gradient of the hidden states takes a second pass over the chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: nn.Linear, chunks: HeadChunks) -> torch.Tensor:
        ctx.chunks, ctx.like = chunks, hidden.new_empty(0)
        return chunked_linear(head, chunks)(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total: torch.Tensor | None = None
        for chunk, (start, end) in enumerate(ctx.chunks.ranges):
            with ctx.chunks.use(chunk) as weight:
                part = gradient[..., start:end] @ weight.to(gradient.dtype)
            total = part if total is None else total.add_(part)
        assert total is not None, "a head without rows"
        return total.to(ctx.like.dtype), None, None
