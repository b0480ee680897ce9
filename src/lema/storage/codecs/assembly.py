"""A parameter made of several tensors of which some are kept as codes: experts, fused projections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from .base import Codec, Run


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of the parameter's elements, and what makes them."""

    target: int
    """The first element's index in the parameter."""
    shape: tuple[int, ...]
    codec: Codec


@dataclass(frozen=True, slots=True)
class Assembly(Codec):
    """Segments that lie side by side in a parameter, each decoded where it belongs, without memory of its own."""

    segments: tuple[Segment, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Those of every segment, one after the other."""
        return tuple(run for segment in self.segments for run in segment.codec.runs)

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode every segment."""
        flat, rest = out.view(-1), iter(stored)
        for segment in self.segments:
            own = list(islice(rest, len(segment.codec.runs)))
            count = math.prod(segment.shape)
            segment.codec.decode(own, flat[segment.target : segment.target + count].view(segment.shape))

    def check(self, stored: Sequence[torch.Tensor]) -> None:
        """Check every segment's own."""
        rest = iter(stored)
        for segment in self.segments:
            segment.codec.check(list(islice(rest, len(segment.codec.runs))))
