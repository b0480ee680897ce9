"""The head's weight in memory only while it is used, whole or by runs of rows, and when that is worth its reads.

It knows one parameter and its slot; it knows nothing of logits or of the layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..storage.layout import PAGE, Extent, Move, ParameterSource, SlotLayout, align_up
from ..storage.reader import DiskReader
from ..storage.views import drop_pages, typed_view
from .lane import Lane
from .ring import Load
from .schedule import Phase, Schedule, Visit
from .transport import DeviceBackend

HEAD = -1
"""Number of the head where a unit is asked for; it has a ring of its own."""
SLICE_BYTES = 16 << 20
"""Of a run of a head that is there whole, roughly."""


class HeadChunks:
    """The head's weight by runs of vocabulary rows, in slots of its own.

    Layout: chunk c is rows `ranges[c]`, in slot c modulo 2, or on the host in a slot of its own where it is to stay
    there; the reads of a chunk are those of its rows alone.

    Args:
        source: the weight `[vocab, hidden]`, stored as it is computed with.
        rows: vocabulary rows of a chunk.
        reader: reads them.
        backend: the device the logits are computed on; None: the CPU.
        in_ram: read once; afterwards chunks come from RAM.
    """

    def __init__(
        self,
        source: ParameterSource,
        rows: int,
        reader: DiskReader,
        backend: DeviceBackend | None = None,
        in_ram: bool = False,
    ) -> None:
        vocab, hidden = source.shape
        record, first = source.pieces[0].record, source.pieces[0].source
        self.ranges = [(start, min(start + rows, vocab)) for start in range(0, vocab, rows)]
        width = hidden * source.dtype.itemsize
        begin = record.offset + first * source.dtype.itemsize
        extents, nbytes, moves, places = {}, {}, {}, []
        for chunk, (start, end) in enumerate(self.ranges):
            offset, size = begin + start * width, (end - start) * width
            extents[chunk] = [Extent(record.file, offset, size, offset % PAGE, (record,))]
            nbytes[chunk] = align_up(offset % PAGE + size, PAGE)
            moves[chunk] = [Move(offset % PAGE, 0, size)]
            places.append(offset % PAGE if backend is None else 0)
        slots = {chunk: chunk % 2 for chunk in extents}
        host = {chunk: chunk for chunk in extents} if in_ram else slots
        self.lane = Lane(
            extents, nbytes, reader, host, slots, moves=moves, depth=None, on_overwrite=self._raise_versions,
            backend=backend, stream="head",
        )  # fmt: skip
        self.nbytes = self.lane.host_bytes
        self.device = self.lane.buffers[0].device
        self._views = [
            typed_view(self.lane.buffer_of[c], places[c], source.dtype, (end - start, hidden))
            for c, (start, end) in enumerate(self.ranges)
        ]
        self.lane.predict(Schedule.inference(len(self.ranges)))

    @contextlib.contextmanager
    def use(self, chunk: int) -> Iterator[torch.Tensor]:
        """The chunk's weight `[rows, hidden]`, valid inside the block."""
        self.lane.acquire(chunk)
        try:
            yield self._views[chunk]
        finally:
            self.lane.release(chunk)

    def prefetch(self) -> None:
        """Begin to read the first chunks."""
        self.lane.ring.prefetch(0)

    def _raise_versions(self, load: Load) -> None:
        torch.autograd.graph.increment_version([self._views[c] for c in (load.unit, load.evicted) if c is not None])


class SlicedHead:
    """A head that is there whole, seen by runs of vocabulary rows.

    Args:
        weight: `[vocab, hidden]`.
        nbytes: bytes of a run, roughly.
    """

    def __init__(self, weight: torch.Tensor, nbytes: int = SLICE_BYTES) -> None:
        vocab, hidden = weight.shape
        rows = max(nbytes // (hidden * weight.dtype.itemsize), 1)
        self.ranges = [(start, min(start + rows, vocab)) for start in range(0, vocab, rows)]
        self._weight = weight

    @contextlib.contextmanager
    def use(self, chunk: int) -> Iterator[torch.Tensor]:
        """The chunk's weight `[rows, hidden]`."""
        start, end = self.ranges[chunk]
        yield self._weight[start:end]


class HeadSlot:
    """The head's weight, in memory only while it is used: one slot whose pages are given back after. On CPU.

    Args:
        source: the weight.
        reader: reads it.
        stays: read it once and keep it.
    """

    def __init__(self, source: ParameterSource, reader: DiskReader, stays: bool = False) -> None:
        self._stays = stays
        layout = SlotLayout([source])
        self.lane = Lane(
            {HEAD: layout.extents}, {HEAD: layout.nbytes}, reader, {HEAD: 0}, {}, depth=0,
            on_overwrite=self._raise_version,
        )  # fmt: skip
        self.lane.predict(Schedule((Visit(HEAD, Phase.FORWARD),)))
        self._buffer = self.lane.buffers[0]
        self.view = typed_view(self._buffer, layout.direct[0].offset, source.dtype, source.shape)
        self.nbytes = layout.nbytes
        self.holds = 0

    def prefetch(self) -> None:
        """Begin to read it, unless it is there."""
        if not self.holds:
            self.lane.ring.prefetch(HEAD)

    def acquire(self) -> None:
        """Wait until the weight is there; may be nested."""
        if self.holds == 0:
            self.lane.acquire(HEAD)
        self.holds += 1

    def release(self) -> None:
        """The last release gives the pages back."""
        self.holds -= 1
        if self.holds == 0:
            self.lane.release(HEAD)
            if not self._stays and self.lane.ring.forget():
                torch.autograd.graph.increment_version(self.view)
                drop_pages(self._buffer)

    def _raise_version(self, load: Load) -> None:
        torch.autograd.graph.increment_version(self.view)
