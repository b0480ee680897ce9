"""The head's weight in memory only while it is used, whole or by runs of rows, and when that is worth its reads.

It knows one parameter and its slot; it knows nothing of logits or of the layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .binding import drop_pages, page_aligned, typed_view
from .layout import PAGE, Extent, ParameterSource, SlotLayout
from .reader import DiskReader, ReadJob
from .ring import Load, Ring
from .schedule import Phase, Schedule, Visit

HEAD = -1
"""Number of the head where a unit is asked for; it has a ring of its own."""


class HeadChunks:
    """The head's weight by runs of vocabulary rows, on a ring of two slots of its own.

    Layout: chunk c is rows `ranges[c]`, in slot c modulo 2; the reads of a chunk are those of its rows alone.

    Args:
        source: the weight `[vocab, hidden]`, stored as it is computed with.
        rows: vocabulary rows of a chunk.
        reader: reads them.
    """

    def __init__(self, source: ParameterSource, rows: int, reader: DiskReader) -> None:
        vocab, hidden = source.shape
        record, first = source.pieces[0].record, source.pieces[0].source
        self.ranges = [(start, min(start + rows, vocab)) for start in range(0, vocab, rows)]
        width = hidden * source.dtype.itemsize
        begin = record.offset + first * source.dtype.itemsize
        self._buffers = [page_aligned(rows * width + PAGE) for _ in self.ranges[:2]]
        self.nbytes = sum(buffer.numel() for buffer in self._buffers)
        self._views: list[torch.Tensor] = []
        extents: list[Extent] = []
        for chunk, (start, end) in enumerate(self.ranges):
            offset = begin + start * width
            extents.append(Extent(record.file, offset, (end - start) * width, offset % PAGE, (record,)))
            buffer = self._buffers[chunk % 2]
            self._views.append(typed_view(buffer, offset % PAGE, source.dtype, (end - start, hidden)))

        def fill(load: Load) -> None:
            reader.submit(
                ReadJob(
                    extents=[extents[load.unit]],
                    buffer=memoryview(self._buffers[load.slot].numpy()),  # type: ignore[arg-type]
                    cancelled=lambda: load.cancelled,
                    done=lambda error: self.ring.finished(load, error),
                )
            )

        numbers = range(len(self.ranges))
        self.ring = Ring({chunk: chunk % 2 for chunk in numbers}, Schedule.inference(len(numbers)), None, fill)
        self.ring.on_overwrite = self._raise_versions

    @contextlib.contextmanager
    def use(self, chunk: int) -> Iterator[torch.Tensor]:
        """The chunk's weight `[rows, hidden]`, valid inside the block."""
        self.ring.acquire(chunk)
        try:
            yield self._views[chunk]
        finally:
            self.ring.release(chunk)

    def prefetch(self) -> None:
        """Begin to read the first chunks."""
        self.ring.prefetch(0)

    def _raise_versions(self, load: Load) -> None:
        torch.autograd.graph.increment_version([self._views[c] for c in (load.unit, load.evicted) if c is not None])


class HeadSlot:
    """The head's weight, in memory only while it is used: a ring of one slot whose pages are given back after.

    Args:
        source: the weight.
        reader: reads it.
        stays: read it once and keep it.
    """

    def __init__(self, source: ParameterSource, reader: DiskReader, stays: bool = False) -> None:
        self._stays = stays
        layout = SlotLayout([source])
        self.buffer = page_aligned(layout.nbytes)
        self.view = typed_view(self.buffer, layout.direct[0].offset, source.dtype, source.shape)
        self.nbytes = layout.nbytes
        self.holds = 0

        def fill(load: Load) -> None:
            reader.submit(
                ReadJob(
                    extents=layout.extents,
                    buffer=memoryview(self.buffer.numpy()),  # type: ignore[arg-type]
                    cancelled=lambda: load.cancelled,
                    done=lambda error: self.ring.finished(load, error),
                )
            )

        self.ring = Ring({HEAD: 0}, Schedule((Visit(HEAD, Phase.FORWARD),)), 0, fill)
        self.ring.on_overwrite = lambda load: torch.autograd.graph.increment_version(self.view)

    def prefetch(self) -> None:
        """Begin to read it, unless it is there."""
        if not self.holds:
            self.ring.prefetch(HEAD)

    def acquire(self) -> None:
        """Wait until the weight is there; may be nested."""
        if self.holds == 0:
            self.ring.acquire(HEAD)
        self.holds += 1

    def release(self) -> None:
        """The last release gives the pages back."""
        self.holds -= 1
        if self.holds == 0:
            self.ring.release(HEAD)
            if not self._stays and self.ring.forget():
                torch.autograd.graph.increment_version(self.view)
                drop_pages(self.buffer)


def head_should_stream(head_bytes: int, step_bytes: int) -> bool:
    """Whether to read the head anew at every step instead of leaving it mapped.

    Where memory is short a mapped head is read again through page faults; where the head is a large part
    of the model, reading it on purpose costs more than it saves. So: from 32 MiB on, if it adds at most a
    sixteenth to the bytes a step reads.
    """
    return head_bytes >= 32 << 20 and head_bytes * 16 <= step_bytes
