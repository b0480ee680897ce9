"""Where the elements of a tensor come from, computed without touching one: stack, concatenate, chunk.

It knows shapes and runs of elements, of tensors stored as they are or as codes; it knows nothing of models or of
transformers' conversions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import UnsupportedError
from .codecs.assembly import Assembly, Segment
from .codecs.base import Codec, Piece, Placement, Stored
from .header import TensorRecord


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous run of elements of a tensor of the file, and where it goes; offsets and `count` in elements."""

    tensor: TensorRecord | Stored
    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor as its shape and the contiguous runs it is made of."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @classmethod
    def whole(cls, tensor: TensorRecord | Stored) -> PlacedTensor:
        """A tensor of the file as it is, or as what its codes stand for."""
        return cls(tensor.shape, (Part(tensor, 0, 0, math.prod(tensor.shape)),))

    @property
    def codec(self) -> Codec:
        """What makes the tensor of stored ones.

        Raises:
            UnsupportedError: a part of a tensor is wanted that is kept as codes and can be decoded only whole.
        """
        pieces = tuple(
            Piece(part.tensor, part.source, part.target, part.count)
            for part in self.parts
            if isinstance(part.tensor, TensorRecord)
        )
        if len(pieces) == len(self.parts):
            return Placement(pieces)
        segments = tuple(_segment(part) for part in self.parts)
        alone = segments[0].codec if len(segments) == 1 and segments[0].shape == self.shape else None
        return alone or Assembly(segments)

    def unsqueeze(self, dim: int) -> PlacedTensor:
        """With a dimension of one inserted."""
        return PlacedTensor((*self.shape[:dim], 1, *self.shape[dim:]), self.parts)

    def _runs(self, inner: int) -> Iterator[tuple[int, int, Part]]:
        """Parts cut at multiples of `inner` elements: (outer index, offset within it, part)."""
        for part in self.parts:
            done = 0
            while done < part.count:
                outer, within = divmod(part.target + done, inner)
                count = min(part.count - done, inner - within)
                yield outer, within, Part(part.tensor, part.source + done, within, count)
                done += count


def concatenate(tensors: Sequence[PlacedTensor], dim: int) -> PlacedTensor:
    """As `torch.cat`. Shapes agree in every other dimension."""
    first = tensors[0].shape
    inner = [math.prod(t.shape[dim:]) for t in tensors]
    total = sum(inner)
    parts = []
    start = 0
    for tensor, size in zip(tensors, inner, strict=True):
        for outer, within, part in tensor._runs(size):
            parts.append(Part(part.tensor, part.source, outer * total + start + within, part.count))
        start += size
    shape = (*first[:dim], sum(t.shape[dim] for t in tensors), *first[dim + 1 :])
    return PlacedTensor(shape, _coalesce(parts))


def stack(tensors: Sequence[PlacedTensor], dim: int) -> PlacedTensor:
    """As `torch.stack`."""
    return concatenate([tensor.unsqueeze(dim) for tensor in tensors], dim)


def chunk(tensor: PlacedTensor, chunks: int, dim: int) -> list[PlacedTensor]:
    """As `torch.chunk` into equal parts."""
    rest = math.prod(tensor.shape[dim + 1 :])
    width = tensor.shape[dim] // chunks * rest
    parts: list[list[Part]] = [[] for _ in range(chunks)]
    for run, within, part in tensor._runs(width):
        outer, number = divmod(run, chunks)
        parts[number].append(Part(part.tensor, part.source, outer * width + within, part.count))
    shape = (*tensor.shape[:dim], tensor.shape[dim] // chunks, *tensor.shape[dim + 1 :])
    return [PlacedTensor(shape, _coalesce(one)) for one in parts]


def _coalesce(parts: Sequence[Part]) -> tuple[Part, ...]:
    merged: list[Part] = []
    for part in sorted(parts, key=lambda p: p.target):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.tensor == part.tensor
            and last.source + last.count == part.source
            and last.target + last.count == part.target
        ):
            merged[-1] = Part(last.tensor, last.source, last.target, last.count + part.count)
        else:
            merged.append(part)
    return tuple(merged)


def _segment(part: Part) -> Segment:
    tensor = part.tensor
    if isinstance(tensor, TensorRecord):
        return Segment(part.target, (part.count,), Placement((Piece(tensor, part.source, 0, part.count),)))
    if part.source or part.count != math.prod(tensor.shape):
        raise UnsupportedError(
            f"{tensor.name}: is kept as codes, and the model wants {part.count} of its {math.prod(tensor.shape)} "
            f"values from number {part.source} on, apart from the rest. Take the model it was made from"
        )
    return Segment(part.target, tensor.shape, tensor.codec)
