"""The head's weight in memory only while it is used, whole or by runs of rows, and when that is worth its reads.

A head, and each run of its rows, has a `LayerState` like a layer; what becomes of logits is not known here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ..planning.footprint import HEAD_CHUNK_BYTES
from ..storage.codecs import Piece, Placement
from ..storage.layout import ParameterSource, SlotLayout
from .layer_state import LayerState, Residency
from .schedule import Phase


class HeadState(LayerState):
    """A head that is there whole while it is used. Uses may nest; after the last its memory goes, if it streams."""

    def __init__(self, unit: int, source: ParameterSource | None, residency: Residency) -> None:
        layout = SlotLayout([source]) if source is not None else None
        super().__init__(unit, "head", [source] if source is not None else [], residency, layout)
        self.holds = 0
        """Uses that have begun and not ended."""

    def label(self, phase: Phase) -> str:
        """A use is the head's and the loss's."""
        return "head and loss"

    def acquire(self, phase: Phase = Phase.FORWARD) -> None:
        """Wait until the weight is there; its one predicted access is that of a forward."""
        if self.holds == 0:
            super().acquire()
        self.holds += 1

    def release(self) -> None:
        """The last release gives the pages back."""
        self.holds -= 1
        if self.holds == 0:
            super().release()
            if self.residency is Residency.STREAMED and self.tier is not None and self.tier.evict():
                self.overwritten()

    def prefetch(self) -> None:
        """Begin to read it, unless it is in use."""
        if not self.holds:
            super().prefetch()


class HeadChunks:
    """The head's weight by runs of vocabulary rows, each a unit of its own.

    Args:
        ranges: first row, and the one after the last, of each run.
        states: of each run.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], states: Sequence[LayerState]) -> None:
        self.ranges = list(ranges)
        self.states = list(states)

    @contextlib.contextmanager
    def use(self, chunk: int) -> Iterator[torch.Tensor]:
        """The chunk's weight `[rows, hidden]`, valid inside the block."""
        state = self.states[chunk]
        state.acquire()
        try:
            yield state.in_slot[0]
        finally:
            state.release()


def cut_head(source: ParameterSource, rows: int, first_unit: int, moved: bool) -> HeadChunks:
    """A head `[vocab, hidden]`, stored as it is computed with, by runs of rows; each reads its own bytes alone.

    Args:
        first_unit: number of the first run; the others follow.
        moved: the runs are computed with in device slots.
    """
    ranges = row_ranges(source.shape[0], rows)
    states = []
    for number, (start, end) in enumerate(ranges):
        run = _rows_of(source, start, end)
        layout = SlotLayout([run], moved=moved)
        states.append(LayerState(first_unit + number, f"head, piece {number}", [run], Residency.STREAMED, layout))
    return HeadChunks(ranges, states)


def row_ranges(vocab: int, rows: int) -> list[tuple[int, int]]:
    """First row, and the one after the last, of runs of at most so many rows."""
    return [(start, min(start + rows, vocab)) for start in range(0, vocab, rows)]


def _rows_of(source: ParameterSource, start: int, end: int) -> ParameterSource:
    piece, hidden = source.pieces[0], source.shape[1]
    run = Piece(piece.record, piece.source + start * hidden, 0, (end - start) * hidden)
    return ParameterSource(source.name, (end - start, hidden), source.dtype, Placement((run,)))


class SlicedHead:
    """A head that is there whole, seen by runs of vocabulary rows.

    Args:
        weight: `[vocab, hidden]`.
        nbytes: bytes of a run, roughly.
    """

    def __init__(self, weight: torch.Tensor, nbytes: int = HEAD_CHUNK_BYTES) -> None:
        vocab, hidden = weight.shape
        rows = max(nbytes // (hidden * weight.dtype.itemsize), 1)
        self.ranges = row_ranges(vocab, rows)
        self._weight = weight

    @contextlib.contextmanager
    def use(self, chunk: int) -> Iterator[torch.Tensor]:
        """The chunk's weight `[rows, hidden]`."""
        start, end = self.ranges[chunk]
        yield self._weight[start:end]
