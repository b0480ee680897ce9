"""The head's weight in memory only while it is used, and when that is worth its reads.

It knows one parameter and its slot; it knows nothing of logits or of the layers.
"""

from __future__ import annotations

import torch

from .binding import drop_pages, page_aligned, typed_view
from .layout import ParameterSource, SlotLayout
from .reader import DiskReader, ReadJob
from .ring import Load, Ring
from .schedule import Phase, Schedule, Visit

HEAD = -1
"""Number of the head where a unit is asked for; it has a ring of its own."""


class HeadSlot:
    """The head's weight, in memory only while it is used: a ring of one slot whose pages are given back after."""

    def __init__(self, source: ParameterSource, reader: DiskReader) -> None:
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
            if self.ring.forget():
                torch.autograd.graph.increment_version(self.view)
                drop_pages(self.buffer)


def head_should_stream(head_bytes: int, step_bytes: int) -> bool:
    """Whether to read the head anew at every step instead of leaving it mapped.

    Where memory is short a mapped head is read again through page faults; where the head is a large part
    of the model, reading it on purpose costs more than it saves. So: from 32 MiB on, if it adds at most a
    sixteenth to the bytes a step reads.
    """
    return head_bytes >= 32 << 20 and head_bytes * 16 <= step_bytes
