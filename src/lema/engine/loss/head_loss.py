"""Head and loss of a step: on all logits at once, or by pieces of positions and of the vocabulary.

It knows where the head is and which way of computing the loss that leaves; it knows nothing of steps.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from ...errors import UnsupportedError
from ...models.causal_lm import CausalLM
from ...models.trained import trained_outside
from ...planning.footprint import HEAD_CHUNK_BYTES
from ...planning.plan import loss_chunk
from ...streaming.head import SlicedHead
from ...streaming.timeline import COMPUTE
from ...streaming.weight_store import WeightStore
from .epilogue import ModelEpilogue
from .positions import LossResult, compute_loss
from .streamed_head import head_held, head_pieces
from .vocabulary import Head, HeadPieces, linear_cross_entropy

logger = logging.getLogger(__name__)

_WIDEST = 1024
"""Positions at once beyond which a matmul gains nothing from more."""


def wide_piece(chunk: int, positions: int) -> tuple[int, int]:
    """Positions at once, and bytes of the head's rows for them, of a piece no larger than `chunk` beside 16 MiB.

    A matmul arranges its weight anew at each call, so few positions pay for it dearly: against all logits at once two
    matmuls of 128, 256 and 512 positions beside 4 MiB took 1.15, 1.03 and 0.94 of the time (float32, width 2048).
    """
    wide = min(max(chunk, min(4 * chunk, _WIDEST)), max(positions, 1))
    return wide, min(HEAD_CHUNK_BYTES, HEAD_CHUNK_BYTES * chunk // wide)


class HeadLoss:
    """The loss of hidden states and its gradient there, the head being where memory has it.

    Args:
        lm: the model.
        memory: holds its head; its plan says how many targets are a piece.
    """

    def __init__(self, lm: CausalLM, memory: WeightStore) -> None:
        self._lm = lm
        self._memory = memory
        self._epilogue = ModelEpilogue(lm)
        self._trained = list(trained_outside(lm.module, lm.layers).values())
        self._sliceable: bool | None = None

    def __call__(
        self, hidden: torch.Tensor, targets: torch.Tensor, denominator: float, *, scale: float = 1.0,
        with_gradient: bool = True, with_logits: bool = False, with_accuracy: bool = False, smoothing: float = 0.0,
    ) -> LossResult:  # fmt: skip
        """As `compute_loss`: `hidden` is `[batch, seq, hidden]`, `targets` `[batch, seq]`."""
        wanted: dict[str, Any] = {
            "scale": scale, "with_gradient": with_gradient, "with_accuracy": with_accuracy, "smoothing": smoothing,
            "trained": self._trained,
        }  # fmt: skip
        chunk = self._chunk_of(targets)
        pieces = head_pieces(self._memory)
        if pieces is not None:
            with self._memory.timeline.span(COMPUTE, "head and loss"):
                return self._by_pieces(hidden, targets, denominator, pieces, chunk, with_logits, wanted)
        with head_held(self._memory):
            if chunk is not None and self._slices_head(hidden):
                chunk, nbytes = wide_piece(chunk, targets.numel())
                sliced = SlicedHead(self._epilogue.linear.weight, nbytes)
                return self._by_pieces(hidden, targets, denominator, sliced, chunk, with_logits, wanted)
            return compute_loss(
                self._lm, hidden, targets, denominator, chunk_size=chunk, with_logits=with_logits, **wanted
            )

    def _by_pieces(
        self, hidden: torch.Tensor, targets: torch.Tensor, denominator: float, pieces: HeadPieces, chunk: int | None,
        with_logits: bool, wanted: dict[str, Any],
    ) -> LossResult:  # fmt: skip
        hidden, head, epilogue = hidden.detach(), Head(self._epilogue.linear, pieces), self._epilogue
        how = {**wanted, "denominator": denominator, "positions": chunk or targets.numel()}
        epilogue.check(pieces.ranges, hidden)
        with epilogue.in_place():
            result = linear_cross_entropy(hidden, head, targets, epilogue, **how)
            if not with_logits:
                return result
            with torch.no_grad():
                return dataclasses.replace(result, logits=epilogue(hidden, head))

    def _slices_head(self, hidden: torch.Tensor) -> bool:
        """Whether a chunked loss may cut the vocabulary too, which the family has to allow."""
        if self._sliceable is None:
            try:
                weight = self._epilogue.linear.weight
                self._epilogue.check(SlicedHead(weight).ranges, hidden.new_empty(0, hidden.shape[-1]))
                self._sliceable = True
            except UnsupportedError as error:
                logger.info("the loss is cut by positions only: %s", error)
                self._sliceable = False
        return self._sliceable

    def _chunk_of(self, targets: torch.Tensor) -> int | None:
        return loss_chunk(self._memory.plan.loss_chunk_size, targets.numel(), self._lm.vocab_size)
