"""Bytes of two 4-bit codes each, made into values by a table and a scale for every block of them.

It knows tables, blocks and how to be fast with torch's operations alone; whose codes they are is known elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import torch

_BYTES_A_THREAD = 1 << 16
"""Of codes decoded at a time by each thread of a CPU: what that takes, 16 bytes a byte, stays in caches near a core."""
_ROWS_A_THREAD = 2
_BYTES_ON_DEVICE = 1 << 22


def decode_pairs(
    codes: torch.Tensor,
    table: tuple[float, ...],
    scales: torch.Tensor,
    block: int,
    out: torch.Tensor,
    rounded: torch.dtype,
    low_first: bool = False,
) -> None:
    """`out[i] = table[code i] * scales[i // block]`: multiplied in float32, rounded to one type, then cast to `out`'s.

    On a CPU a byte is one look-up of two float32 values in a table of 256 pairs, in chunks that all threads share.

    Args:
        codes: uint8 `[ceil(n / 2)]`, two codes a byte.
        table: the 16 values that codes stand for.
        scales: float32 `[ceil(n / block)]`.
        block: values that share a scale; a power of two from 2 to 8,192.
        out: `[n]`, contiguous.
        rounded: the type that products are rounded to first.
        low_first: the low half of a byte is the first of its two codes; else the high half.
    """
    on_cpu = out.device.type == "cpu"
    threads = torch.get_num_threads()
    step = _BYTES_A_THREAD * threads if on_cpu else _BYTES_ON_DEVICE
    pairs = _pairs(table, low_first, out.device)
    for start in range(0, codes.numel(), step):
        part = codes[start : start + step]
        first = 2 * start
        count = min(2 * part.numel(), out.numel() - first)
        values = _on_cpu(part, pairs, _ROWS_A_THREAD * threads) if on_cpu else pairs[part.to(torch.int32)]
        values = values.view(-1)[:count]
        whole = count - count % block
        own = scales[first // block : -(-(first + count) // block)]
        values[:whole].view(-1, block).mul_(own[: whole // block, None])
        if whole < count:
            values[whole:].mul_(own[-1])
        target = out[first : first + count]
        if rounded in (torch.float32, out.dtype):
            target.copy_(values)
        else:
            target.copy_(values.to(rounded))


def _on_cpu(codes: torch.Tensor, pairs: torch.Tensor, rows: int) -> torch.Tensor:
    """Float32 `[2 * n]` of this thread's workspace, valid until its next call."""
    count = codes.numel()
    index, values = _workspace.of(count)
    rows = rows if count % rows == 0 else 1  # a gather along a row is one thread's
    index.copy_(codes)
    table = pairs.view(torch.int64).view(1, -1).expand(rows, -1)  # two float32 are moved as one number
    torch.gather(table, 1, index.view(rows, -1), out=values.view(rows, -1))
    return values.view(torch.float32)


class _Workspace(threading.local):
    """A thread's memory for one chunk, kept from call to call: new pages would cost more than decoding does."""

    def __init__(self) -> None:
        self._index = self._values = torch.empty(0, dtype=torch.int64)

    def of(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._index.numel() < count:
            self._index, self._values = (torch.empty(count, dtype=torch.int64) for _ in range(2))
        return self._index[:count], self._values[:count]


_workspace = _Workspace()


@lru_cache(maxsize=64)
def _pairs(table: Sequence[float], low_first: bool, device: torch.device) -> torch.Tensor:
    """Float32 `[256, 2]`: the two values of every byte."""
    values = torch.tensor(table, dtype=torch.float32)
    byte = torch.arange(256)
    halves = (byte & 15, byte >> 4) if low_first else (byte >> 4, byte & 15)
    return torch.stack([values[half] for half in halves], 1).contiguous().to(device)
