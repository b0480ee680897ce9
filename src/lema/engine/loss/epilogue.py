"""What a family does to hidden states on their way to logits, around its head's linear: scales, soft caps, slices.

It knows how to have the family's own code do it; it knows nothing of where the head's weight is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ...errors import UnsupportedError
from ...models.causal_lm import CausalLM
from .positions import IGNORE_INDEX
from .vocabulary import Linear


class ModelEpilogue:
    """A model's own way from hidden states to logits, with a linear given to each call in place of its head.

    Made once for a model, whose interceptor has a gate before the head. The head is passed by while the epilogue is
    `in_place`, as long as a loss takes, and only then can it be called; a call says which linear the head stands for.
    """

    def __init__(self, lm: CausalLM) -> None:
        self._lm = lm
        self._linear: Linear | None = None
        self._uses = 0
        self._checked: set[tuple[tuple[int, int], ...]] = set()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the head is whatever linear a call gives."""
        with self._lm.interceptor.gate("epilogue", self.linear).taken_by(self._head):
            yield

    def __call__(self, hidden: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Hidden states `[.., n, hidden]` -> logits `[.., n, rows]`, as many as the linear gives.

        Raises:
            UnsupportedError: the family does not use its head once.
        """
        self._linear, self._uses = linear, 0
        try:
            logits = self._lm.logits(hidden)
        finally:
            self._linear = None
        if self._uses != 1:
            raise UnsupportedError(f"{self._name} uses its head {self._uses} times for one set of logits, not once")
        return logits

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        assert self._linear is not None, "the head was called outside of its epilogue"
        self._uses += 1
        return self._linear(x)

    @property
    def _name(self) -> str:
        return type(self._lm.module).__name__

    @property
    def linear(self) -> nn.Linear:
        """The model's head; `UnsupportedError` where it is not a plain linear layer."""
        head = self._lm.head
        if type(head) is not nn.Linear:
            raise UnsupportedError(
                f"the head of {self._name} is {type(head).__name__}, not a plain linear layer; it has to stay"
            )
        return head

    @torch.no_grad()
    def check(self, ranges: Sequence[tuple[int, int]], like: torch.Tensor) -> None:
        """Check, once for these runs of vocabulary rows, that what the family does after the linear can be done in
        pieces: one number at a time, in no way that depends on where in the vocabulary or on the hidden states, and
        followed by the usual cross entropy. One row of made-up outputs of the linear shows it.

        Args:
            like: hidden states `[.., hidden]` as they will be, of which only kind and width are looked at.

        Raises:
            UnsupportedError: it cannot; names the model's class.
        """
        key = tuple(ranges)
        if key in self._checked:
            return
        vocab = self.linear.out_features
        row = like.new_zeros(1, 1, like.shape[-1])
        outputs = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(0)).mul_(8).to(row)
        with self.in_place():
            self._check_pieces(key, row, outputs)
        self._checked.add(key)

    def _check_pieces(self, ranges: Sequence[tuple[int, int]], row: torch.Tensor, outputs: torch.Tensor) -> None:
        vocab = outputs.shape[-1]
        with torch.enable_grad():
            whole = self(row.requires_grad_(), _constant(outputs))
        if whole.requires_grad:
            raise UnsupportedError(
                f"{self._name} makes its logits of more than its head's outputs, so the gradient cannot be had from "
                "pieces of the head; its head has to stay"
            )
        if whole.shape != outputs.shape or self._lm.vocab_size != vocab:
            raise UnsupportedError(
                f"{self._name} makes {whole.shape[-1]} logits of {vocab} head rows for a vocabulary of "
                f"{self._lm.vocab_size}; pieces of the head do not show which rows count, so its head has to stay"
            )
        pieces = [self(row, _constant(outputs[..., start:end])) for start, end in ranges]
        if not torch.allclose(whole, torch.cat(pieces, -1), rtol=8 * torch.finfo(outputs.dtype).eps, atol=0.0):
            raise UnsupportedError(
                f"{self._name} does something to its logits that depends on the rest of the vocabulary or on the place "
                "in it; that cannot be done in pieces, so its head has to stay"
            )
        logits = whole.float().repeat(1, 3, 1)
        loss = self._lm.loss(logits, torch.tensor([[0, IGNORE_INDEX, vocab - 1]], device=logits.device), 4.0)
        both = logits[0, :2]
        expected = (both.logsumexp(-1).sum() - both[0, 0] - both[0, -1]) / 4.0
        if not torch.allclose(loss.to(expected), expected, rtol=1e-4):
            raise UnsupportedError(
                f"{self._name} has another loss than cross entropy over targets, so its head has to stay"
            )


def _constant(outputs: torch.Tensor) -> Linear:
    return lambda _: outputs
