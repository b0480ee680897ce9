"""The way of a set of units to where they are computed: disk -> host slots -> device slots, where there is a device.

It knows extents, slots and the two rings; it knows nothing of parameters or of what a unit is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

from ..storage.layout import Extent, Move
from ..storage.reader import DiskReader, ReadJob
from ..storage.views import page_aligned
from .ring import Load, Ring
from .schedule import Phase, Schedule
from .timeline import DISK, WAIT, Timeline
from .transport import DeviceBackend, DeviceTier


class Lane:
    """Rings of slots between the files and the computation.

    Layout: every host slot is a flat page-aligned buffer as large as the largest unit that lives there, pinned
    once where there is a device; device slots likewise.

    Args:
        extents: what to read for each unit.
        nbytes: bytes each unit takes in a host slot.
        reader: reads them.
        host: host slot of each unit.
        device: device slot of each unit; unused without a backend.
        moves: how the bytes of each unit get from its host slot to its device slot; unused without a backend.
        depth: visits planned ahead; None: as many as the slots allow.
        on_overwrite: called just before a slot of the compute place starts to be filled; held weakly if a method.
        backend: the device; None: computed in host slots.
        stream: of the copies to the device; lanes with different names do not wait for each other's.
        poison: fill a host slot with NaN bytes before each load (for tests).
    """

    def __init__(
        self,
        extents: Mapping[int, Sequence[Extent]],
        nbytes: Mapping[int, int],
        reader: DiskReader,
        host: dict[int, int],
        device: dict[int, int],
        *,
        moves: Mapping[int, Sequence[Move]] = {},
        depth: int | None,
        on_overwrite: Callable[[Load], None],
        backend: DeviceBackend | None = None,
        stream: str = "weights",
        poison: bool = False,
    ) -> None:
        self._extents = extents
        self._reader = reader
        self._poison = poison
        self._timeline = Timeline(backend)
        self._names: Callable[[int], str] = "unit {}".format
        self._host_buffers = [page_aligned(size) for size in _slot_sizes(host, nbytes)]
        fill = _weakly(self._start_read)
        self._tier: DeviceTier | None = None
        if backend is None:
            self._host = self.ring = Ring(host, Schedule(()), depth, fill)
            self.buffers = self._host_buffers
        else:
            for buffer in self._host_buffers:
                backend.pin(buffer)
            self._host = Ring(host, Schedule(()), depth, fill)
            self._host.learns = False  # the first cycle has loads that later ones do not have
            behind = None if depth is None else max(depth, 1)
            self._tier = DeviceTier(
                backend, self._host, self._host_buffers, device, Schedule(()), behind, moves, stream
            )
            self.ring, self.buffers = self._tier.ring, self._tier.buffers
        self.ring.on_overwrite = _weakly(on_overwrite) if hasattr(on_overwrite, "__self__") else on_overwrite
        self.buffer_of = {unit: self.buffers[slot] for unit, slot in self.ring.slot_of.items()}

    def observe(self, timeline: Timeline, names: Callable[[int], str]) -> None:
        """Tell a timeline of reads, copies and waits; `names` is what it calls a unit."""
        self._timeline, self._names = timeline, names
        if self._tier is not None:
            self._tier.timeline, self._tier.names = timeline, names

    @property
    def host_bytes(self) -> int:
        """Bytes of all host slots."""
        return sum(buffer.numel() for buffer in self._host_buffers)

    @property
    def copied_bytes(self) -> int:
        """Bytes copied to the device so far."""
        return self._tier.copied_bytes if self._tier is not None else 0

    @property
    def wait_seconds(self) -> float:
        """Seconds the computation stood still for units so far."""
        return self.ring.wait_seconds if self._tier is None else self._tier.wait_seconds

    def predict(self, schedule: Schedule) -> None:
        """Expect these visits, over and over, from now on."""
        if self.ring.predict(schedule) and self._tier is not None:
            self._host.predict(schedule.loads(self.ring.slot_of))

    def acquire(self, unit: int, phase: Phase = Phase.FORWARD) -> None:
        """Wait until the unit's bytes are where they are computed with; see `Ring.acquire`."""
        with self._timeline.span(WAIT, self._names(unit)):
            if self._tier is None:
                self.ring.acquire(unit, phase)
            else:
                self._tier.acquire(unit, phase)

    def release(self, unit: int) -> None:
        """Say that a use of the unit is spent."""
        if self._tier is None:
            self.ring.release(unit)
        else:
            self._tier.release(unit)

    def abort(self) -> None:
        """Cancel what is under way; the reader is stopped by its owner."""
        if self._tier is not None:
            self._tier.ring.abort()
            self._tier.stop()
        self._host.abort()

    def close(self) -> None:
        """Refuse further visits."""
        if self._tier is not None:
            self._tier.ring.close()
        self._host.close()
        if self._tier is not None:
            self._tier.stop()

    def _start_read(self, load: Load) -> None:
        buffer, ring = self._host_buffers[load.slot], self._host
        if self._poison:
            buffer.fill_(0xFF)
        extents = self._extents[load.unit]
        reading = self._timeline.transfer(DISK, self._names(load.unit), sum(extent.nbytes for extent in extents))

        def done(error: BaseException | None) -> None:
            reading.end(whole=error is None and not load.cancelled)
            ring.finished(load, error)

        self._reader.submit(
            ReadJob(
                extents=extents,
                buffer=memoryview(buffer.numpy()),  # type: ignore[arg-type]
                cancelled=lambda: load.cancelled,
                done=done,
                begun=reading.begin,
            )
        )


def _slot_sizes(slot_of: Mapping[int, int], nbytes: Mapping[int, int]) -> list[int]:
    """Bytes of each slot: of the largest unit that lives there."""
    sizes = [0] * (max(slot_of.values(), default=-1) + 1)
    for unit, slot in slot_of.items():
        sizes[slot] = max(sizes[slot], nbytes[unit])
    return sizes


def _weakly(method: Callable[[Load], None]) -> Callable[[Load], None]:
    """The bound method without keeping its object alive, so that a forgotten owner can end its threads."""
    weak = weakref.WeakMethod(method)

    def call(load: Load) -> None:
        if (strong := weak()) is not None:
            strong(load)

    return call
