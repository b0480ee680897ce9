"""Elements of tensors on disk, read by the run, so that none need be in memory whole that is not kept as codes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import WeightsError
from ..storage.placement import PlacedTensor
from ..storage.plain_tensors import PlainTensor, PlainTensors

RUN = 1 << 20
"""Elements handled at once: 4 MiB of float32."""


def runs(tensors: PlainTensors, tensor: PlainTensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """The elements from `start` to `stop` in runs of bounded length."""
    for first in range(start, stop, RUN):
        yield tensors.read(tensor, first, min(RUN, stop - first))


def read_parameter(tensors: PlainTensors, name: str, placed: PlacedTensor, start: int, stop: int) -> torch.Tensor:
    """Elements `start` to `stop` of a parameter, gathered from wherever they are stored, as float32."""
    values = torch.empty(stop - start, dtype=torch.float32)
    filled = 0
    for part in placed.parts:
        first, last = max(start, part.target), min(stop, part.target + part.count)
        if first < last:
            run = tensors.read(part.tensor, part.source + first - part.target, last - first)
            values[first - start : last - start] = run
            filled += last - first
    if filled != stop - start:
        raise WeightsError(f"{name}: {filled} of {stop - start} elements have a source. Download it again.")
    return values
