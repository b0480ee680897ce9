"""Pinned host memory in areas of one size, handed out and taken back.

It knows memory, pinning and the events of copies; it knows nothing of what lies in an area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..storage.layout import PAGE, align_up
from ..storage.views import page_aligned
from .backend import DeviceBackend, Event


@dataclass(eq=False, slots=True)
class Area:
    """Host memory of one boundary."""

    memory: torch.Tensor
    stored: Event
    fetched: Event

    def settle(self) -> None:
        """Wait until no copy stream reads or writes the memory."""
        self.stored.synchronize()
        self.fetched.synchronize()


class Arena:
    """Pinned host memory in chunks of equal areas. A chunk without a live boundary goes when a larger one comes."""

    def __init__(self, backend: DeviceBackend, areas: int) -> None:
        self._backend = backend
        self._areas = max(areas, 1)
        self._chunks: list[tuple[torch.Tensor, list[Area]]] = []
        self._free: list[Area] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(memory.numel() for memory, _ in self._chunks)

    def take(self, nbytes: int) -> Area:
        """The smallest free area of this many bytes or more, the one longest free of those."""
        fitting = [area for area in self._free if area.memory.numel() >= nbytes]
        if not fitting:
            self._drop_free_chunks()
            fitting = self._grow(align_up(max(nbytes, 1), PAGE))
        area = min(fitting, key=lambda area: area.memory.numel())
        self._free.remove(area)
        return area

    def give(self, area: Area) -> None:
        """Take an area back; copies of it may still be under way."""
        self._free.append(area)

    def close(self) -> None:
        """Wait for all copies, then unpin and free everything, live or not."""
        self._drop(self._chunks)

    def _grow(self, nbytes: int) -> list[Area]:
        memory = page_aligned(self._areas * nbytes)
        self._backend.pin(memory)
        areas = [
            Area(memory[start : start + nbytes], self._backend.event(), self._backend.event())
            for start in range(0, self._areas * nbytes, nbytes)
        ]
        self._chunks.append((memory, areas))
        self._free += areas
        return areas

    def _drop_free_chunks(self) -> None:
        self._drop([(memory, areas) for memory, areas in self._chunks if all(area in self._free for area in areas)])

    def _drop(self, chunks: Sequence[tuple[torch.Tensor, list[Area]]]) -> None:
        for memory, areas in list(chunks):
            for area in areas:
                area.settle()
            self._backend.unpin(memory)
            self._chunks = [chunk for chunk in self._chunks if chunk[0] is not memory]
            self._free = [area for area in self._free if area not in areas]
