"""Elements of tensors on disk, read by the run, so that no tensor need be in memory whole.

It knows records and pieces; it knows nothing of adapters or of what is written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import ReadError
from ..storage.header import open_weights, show
from ..storage.index import TensorRecord
from ..storage.layout import ParameterSource

RUN = 1 << 20
"""Elements handled at once: 4 MiB of float32."""


def read_run(record: TensorRecord, start: int, count: int) -> torch.Tensor:
    """Elements `start` to `start + count` of a stored tensor in row-major order, in the stored type: `[count]`.

    Raises:
        ReadError: the file could not be read that far.
    """
    raw = torch.empty(count * record.dtype.itemsize, dtype=torch.uint8)
    where = record.offset + start * record.dtype.itemsize
    if raw.numel():
        with open_weights(record.file) as stream:
            try:
                stream.seek(where)
                got = stream.readinto(raw.numpy().data)
            except OSError as error:
                raise ReadError(
                    f"{record.file}: tensor {show(record.name)}: {error.strerror}. Check the disk."
                ) from error
        if got != raw.numel():
            raise ReadError(
                f"{record.file}: tensor {show(record.name)}: {got} of {raw.numel()} bytes could be read from byte "
                f"{where} on; the file was cut short. Download it again."
            )
    return raw.view(record.dtype)


def runs(record: TensorRecord, start: int, stop: int) -> Iterator[torch.Tensor]:
    """The elements from `start` to `stop` in runs of bounded length."""
    for first in range(start, stop, RUN):
        yield read_run(record, first, min(RUN, stop - first))


def read_parameter(source: ParameterSource, start: int, stop: int) -> torch.Tensor:
    """Elements `start` to `stop` of a parameter, gathered from wherever they are stored, as float32."""
    values = torch.empty(stop - start, dtype=torch.float32)
    filled = 0
    for piece in source.pieces:
        first, last = max(start, piece.target), min(stop, piece.target + piece.count)
        if first < last:
            run = read_run(piece.record, piece.source + first - piece.target, last - first)
            values[first - start : last - start] = run
            filled += last - first
    assert filled == stop - start, f"{source.name}: {filled} of {stop - start} elements have a source"
    return values
