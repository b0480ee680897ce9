"""Elements of tensors on disk, read by the run, so that no tensor need be in memory whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import WeightsError
from ..storage.index import TensorRecord
from ..storage.layout import ParameterSource
from ..storage.pieces import read_elements

RUN = 1 << 20
"""Elements handled at once: 4 MiB of float32."""


def runs(record: TensorRecord, start: int, stop: int) -> Iterator[torch.Tensor]:
    """The elements from `start` to `stop` in runs of bounded length."""
    for first in range(start, stop, RUN):
        yield read_elements(record, first, min(RUN, stop - first))


def read_parameter(source: ParameterSource, start: int, stop: int) -> torch.Tensor:
    """Elements `start` to `stop` of a parameter, gathered from wherever they are stored, as float32."""
    values = torch.empty(stop - start, dtype=torch.float32)
    filled = 0
    for piece in source.pieces:
        first, last = max(start, piece.target), min(stop, piece.target + piece.count)
        if first < last:
            run = read_elements(piece.record, piece.source + first - piece.target, last - first)
            values[first - start : last - start] = run
            filled += last - first
    if filled != stop - start:
        raise WeightsError(f"{source.name}: {filled} of {stop - start} elements have a source. Download it again.")
    return values
