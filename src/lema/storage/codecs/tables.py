"""Codes to values by looking them up: a byte, or two at a time, for what a conversion takes many instructions.

It knows codes and tables; it knows nothing of formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

CHUNK = 1 << 19
"""Values decoded at a time: what is needed beside them stays a few megabytes, which a processor's cache holds."""

_ROWS_A_THREAD = 2
_PAIRS = {2: torch.int32, 4: torch.int64}
"""An integer as wide as two values."""


def chunks(count: int, width: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of `count` rows of `width` values, of `CHUNK` values at most, or of `multiple` rows where those are more.

    All but the last have a multiple of `multiple` rows.
    """
    rows = max(CHUNK // max(width, 1) // multiple, 1) * multiple
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A table whose entries are two values as one integer, for `look_up_pairs`: `[n]`, `[n]` -> `[n]`."""
    both = torch.stack((first, second), -1).contiguous()
    return both.view(_PAIRS[first.dtype.itemsize]).view(-1)


def look_up_pairs(table: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Two values for each index, side by side: int32 `[.., n]` -> dtype `[.., 2 n]`."""
    flat, rows = index.reshape(-1), _ROWS_A_THREAD * torch.get_num_threads()
    if index.device.type == "cpu" and len(flat) % rows == 0:  # a gather along a row is one thread's
        found = torch.gather(table.view(1, -1).expand(rows, -1), 1, flat.to(torch.int64).view(rows, -1))
    else:
        found = table.index_select(0, flat)
    return found.view(-1).view(dtype).view(*index.shape[:-1], 2 * index.shape[-1])


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Half-bytes as numbers, the low one first: uint8 `[.., n]` -> float32 `[.., 2 n]`."""
    return look_up_pairs(_nibble_pairs(codes.device), codes.to(torch.int32), torch.float32)


@lru_cache(maxsize=8)
def _nibble_pairs(device: torch.device) -> torch.Tensor:
    byte = torch.arange(256, dtype=torch.int32)
    return pairs((byte & 15).to(torch.float32), (byte >> 4).to(torch.float32)).to(device)
