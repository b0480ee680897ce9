"""Stored bytes read by the piece, without a mapping and without holding a tensor whole.

This is how files are converted, merged and inspected; the layers of a running step come through `reader`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import ReadError
from .header import TensorRecord, open_weights, show

PIECE_BYTES = 4 << 20
"""Of a tensor's stored bytes held at a time."""


def read_into(descriptor: int, target: memoryview, offset: int, where: str) -> int:
    """Fill a buffer from a byte of an open file on; returns how many bytes there were, fewer where the file ends.

    Raises:
        ReadError: the disk refuses; names `where`.
    """
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise ReadError(f"{where}: reading at byte {offset + done} failed: {error.strerror}.") from error
        if count == 0:
            break
        done += count
    return done


def read_pieces(file: Path, offset: int, nbytes: int, dtype: torch.dtype, where: str) -> Iterator[torch.Tensor]:
    """A run of a file's bytes as one-dimensional tensors of at most `PIECE_BYTES`; each is valid until the next.

    Raises:
        ReadError: the file cannot be opened, ends early, or the disk refuses; names `where`.
    """
    size = min(nbytes, PIECE_BYTES)
    raw = torch.empty(size, dtype=torch.uint8)
    view = memoryview(raw.numpy().data)
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise ReadError(f"{where}: cannot be opened: {error.strerror}.") from error
    try:
        for done in range(0, nbytes, size or 1):
            wanted = min(size, nbytes - done)
            got = read_into(descriptor, view[:wanted], offset + done, where)
            if got < wanted:
                end, short = offset + done + got, wanted - got
                raise ReadError(f"{where}: the file ends at byte {end}, {short} bytes short. Download it again.")
            yield raw[:wanted].view(dtype)
    finally:
        os.close(descriptor)


def read_elements(record: TensorRecord, start: int, count: int, descriptor: int | None = None) -> torch.Tensor:
    """Elements `start` to `start + count` of a stored tensor in row-major order, in the stored type: `[count]`.

    Args:
        descriptor: of the file, where it is open already.

    Raises:
        WeightsError: the file cannot be opened.
        ReadError: it could not be read that far.
    """
    if descriptor is None:
        with open_weights(record.file) as stream:
            return read_elements(record, start, count, stream.fileno())
    raw = torch.empty(count * record.dtype.itemsize, dtype=torch.uint8)
    where = f"{record.file}: tensor {show(record.name)}"
    first = record.offset + start * record.dtype.itemsize
    got = read_into(descriptor, memoryview(raw.numpy().data), first, where)
    if got < len(raw):
        raise ReadError(
            f"{where}: {got} of {len(raw)} bytes could be read from byte {first} on; the file was cut short. "
            "Download it again."
        )
    return raw.view(record.dtype)
