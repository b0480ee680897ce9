"""Rows of a tensor in a GGUF file, put in the order the model has them in.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; that of blocks is `gguf_blocks`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..header import TensorRecord
from .base import Codec, Run
from .gguf_blocks import BLOCKS, half
from .records import check_finite
from .tables import chunks


@dataclass(frozen=True, slots=True)
class GgufRecord(TensorRecord):
    """A tensor of a GGUF file. One of blocks is bytes `[.., blocks * bytes of a block]`, whatever it stands for."""

    kind: str
    """gguf's name of its type: F32, Q4_K …"""

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Of what it stands for."""
        if self.kind not in BLOCKS or not self.shape:
            return self.shape
        blocks = BLOCKS[self.kind]
        return *self.shape[:-1], self.shape[-1] // blocks.nbytes * blocks.values


@dataclass(frozen=True, slots=True)
class GgufRows(Codec):
    """Neighbouring rows of a tensor; of one of one dimension, its elements."""

    record: GgufRecord
    first: int
    count: int
    order: tuple[int, ...] | None = None
    """Which of them comes first, second …; None: as they lie."""
    plus: float = 0.0
    """Added to every value, in float32: Gemma's norms are stored with one more."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The rows."""
        width = self.record.shape[-1] if len(self.record.shape) > 1 else 1
        return (Run(self.record, self.first * width, self.count * width),)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`out` has `count` rows, in whatever shape."""
        rows, target = stored[0].view(self.count, -1), out.view(self.count, -1)
        order = None if self.order is None else _order(self.order, out.device)
        for part in chunks(self.count, target.shape[1]):
            codes = rows[part] if order is None else rows.index_select(0, order[part])
            values = self._values(codes)
            target[part].copy_(values.add_(self.plus) if self.plus else values)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        """Rows as float32, or as they are where nothing is to be done with them."""
        if self.record.kind in BLOCKS:
            blocks = BLOCKS[self.record.kind]
            return blocks.decode(codes.reshape(-1, blocks.nbytes)).view(len(codes), -1)
        return codes.to(torch.float32, copy=True) if self.plus else codes

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """Scales of blocks are finite."""
        if self.record.kind in BLOCKS:
            kind = BLOCKS[self.record.kind]
            blocks = stored[0].view(-1, kind.nbytes)
            for start in kind.halves:
                check_finite(self.record, half(blocks, start).view(-1))


@lru_cache(maxsize=64)
def _order(order: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(order, dtype=torch.int32, device=device)
