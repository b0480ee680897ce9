"""Packs: rows laid one after the other up to a length, so that little of a batch is padding.

It knows lengths only. The same rows always make the same packs; only the order of packs changes with the epoch, so
the number of steps of an epoch is known and always the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Which rows lie together."""

    rows: np.ndarray
    """int64: numbers of rows, pack after pack."""
    begins: np.ndarray
    """int64 `[packs + 1]`: where each pack begins in `rows`; the last is their number."""

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        members: np.ndarray = self.rows[self.begins[pack] : self.begins[pack + 1]]
        return members


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Best fit, the longest first: each row goes where it leaves least room, or opens a pack.

    Args:
        lengths: int `[rows]`, tokens, at most `capacity`; rows of 0 are left out.
        capacity: tokens of a pack.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    pack_of = np.empty(len(order), dtype=np.int64)
    open_packs: dict[int, list[int]] = {}  # room left -> packs with just that
    rooms: list[int] = []  # its keys, ascending
    count = 0
    for place, length in enumerate(lengths[order].tolist()):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            number, room, count = count, capacity, count + 1
        else:
            room = rooms[at]
            number = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room]
                rooms.pop(at)
        pack_of[place] = number
        if left := room - length:
            if left not in open_packs:
                open_packs[left] = []
                insort(rooms, left)
            open_packs[left].append(number)
    by_pack = np.argsort(pack_of, kind="stable")
    begins = np.searchsorted(pack_of[by_pack], np.arange(count + 1))
    return Packs(order[by_pack], begins.astype(np.int64))
