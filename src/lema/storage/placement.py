"""Where the elements of a tensor come from, computed without touching one: stack, concatenate, chunk.

It knows shapes and runs of elements; it knows nothing of models or of transformers' conversions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .codecs import Piece
from .index import TensorRecord


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor as its shape and the contiguous runs it is made of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, record: TensorRecord) -> PlacedTensor:
        """A file tensor as it is."""
        return cls(record.shape, (Piece(record, 0, 0, math.prod(record.shape)),))

    def unsqueeze(self, dim: int) -> PlacedTensor:
        """With a dimension of one inserted."""
        return PlacedTensor((*self.shape[:dim], 1, *self.shape[dim:]), self.pieces)

    def _runs(self, inner: int) -> Iterator[tuple[int, int, Piece]]:
        """Pieces cut at multiples of `inner` elements: (outer index, offset within it, piece)."""
        for piece in self.pieces:
            done = 0
            while done < piece.count:
                outer, within = divmod(piece.target + done, inner)
                count = min(piece.count - done, inner - within)
                yield outer, within, Piece(piece.record, piece.source + done, within, count)
                done += count


def concatenate(tensors: Sequence[PlacedTensor], dim: int) -> PlacedTensor:
    """As `torch.cat`. Shapes agree in every other dimension."""
    first = tensors[0].shape
    inner = [math.prod(t.shape[dim:]) for t in tensors]
    total = sum(inner)
    pieces = []
    start = 0
    for tensor, size in zip(tensors, inner, strict=True):
        for outer, within, piece in tensor._runs(size):
            pieces.append(Piece(piece.record, piece.source, outer * total + start + within, piece.count))
        start += size
    shape = (*first[:dim], sum(t.shape[dim] for t in tensors), *first[dim + 1 :])
    return PlacedTensor(shape, _coalesce(pieces))


def stack(tensors: Sequence[PlacedTensor], dim: int) -> PlacedTensor:
    """As `torch.stack`."""
    return concatenate([tensor.unsqueeze(dim) for tensor in tensors], dim)


def chunk(tensor: PlacedTensor, chunks: int, dim: int) -> list[PlacedTensor]:
    """As `torch.chunk` into equal parts."""
    rest = math.prod(tensor.shape[dim + 1 :])
    width = tensor.shape[dim] // chunks * rest
    parts: list[list[Piece]] = [[] for _ in range(chunks)]
    for run, within, piece in tensor._runs(width):
        outer, part = divmod(run, chunks)
        parts[part].append(Piece(piece.record, piece.source, outer * width + within, piece.count))
    shape = (*tensor.shape[:dim], tensor.shape[dim] // chunks, *tensor.shape[dim + 1 :])
    return [PlacedTensor(shape, _coalesce(part)) for part in parts]


def _coalesce(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: p.target):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.record == piece.record
            and last.source + last.count == piece.source
            and last.target + last.count == piece.target
        ):
            merged[-1] = Piece(last.record, last.source, last.target, last.count + piece.count)
        else:
            merged.append(piece)
    return tuple(merged)
