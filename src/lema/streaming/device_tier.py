"""Device slots, filled from host slots by copies that run beside the computation.

It knows streams, events and buffers; it knows nothing of files, layers or schedules.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from ..errors import LemaError
from ..storage.layout import Move
from .backend import DeviceBackend, TimingEvent
from .schedule import AccessSchedule, Phase
from .slot_cache import Load, SlotCache
from .tiers import Tier, slot_sizes, unit_name
from .timeline import COPY, Timeline


class ComputeWaits:
    """How long the compute stream stood still, told by pairs of timing events that are read once they were reached.

    The host runs ahead of the device, so that what the host waits says nothing about the device.
    """

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self._open: deque[tuple[TimingEvent, TimingEvent]] = deque()
        self._spare: list[tuple[TimingEvent, TimingEvent]] = []
        self._seconds = 0.0

    def begin(self) -> tuple[TimingEvent, TimingEvent]:
        """Mark where the compute stream has come to, before anything is waited for."""
        pair = self._spare.pop() if self._spare else (self._backend.timing_event(), self._backend.timing_event())
        self._backend.compute_stream().record_event(pair[0])
        return pair

    def end(self, pair: tuple[TimingEvent, TimingEvent]) -> None:
        """Mark where it goes on."""
        self._backend.compute_stream().record_event(pair[1])
        self._open.append(pair)
        self._collect()

    @property
    def seconds(self) -> float:
        """Sum of the waits that are over."""
        self._collect()
        return self._seconds

    def _collect(self) -> None:
        while self._open and self._open[0][1].query():
            pair = self._open.popleft()
            self._seconds += pair[1].seconds_after(pair[0])
            self._spare.append(pair)


class DeviceTier(Tier):
    """Device slots filled from host slots.

    Layout: as many device slots as the cache has, a `ready` and a `free` event each, and a `copied` event for every
    host slot. The host tier is accessed once for every device load.

    Mechanics: the copier thread takes a load, acquires the unit in the host tier, lets the copy stream wait
    for `free`, enqueues the copy, records `copied` and `ready` and reports the load, so an `acquire` can
    only find recorded events. It goes on to the next load at once: a copy waits for its slot, never for the copy
    before it. The returner thread waits for the copies in their order and releases each host slot behind its own;
    until then the copier does not ask for the slot again. The user's `acquire` makes the compute stream wait for
    `ready`; `release` records `free` on it before the cache may plan the next load of the slot. So every wait comes
    after the record it is meant for.

    Args:
        below: the host slots.
        slot_of: device slot of every unit.
        depth: accesses planned ahead; None: as many as the slots allow.
        moves: how the bytes of a unit get from its host slot to its device slot.
        stream: of the copies; tiers whose streams have different names do not wait for each other's.
        timeline: told of copies.
        names: what it calls a unit.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        below: Tier,
        slot_of: dict[int, int],
        schedule: AccessSchedule,
        depth: int | None,
        moves: Mapping[int, Sequence[Move]],
        stream: str = "weights",
        timeline: Timeline | None = None,
        names: Callable[[int], str] = unit_name,
    ) -> None:
        ends = {unit: max((m.target + m.nbytes for m in moves[unit]), default=0) for unit in slot_of}
        sizes = slot_sizes(slot_of, ends)
        buffers = [backend.device_buffer(size) for size in sizes]
        super().__init__(SlotCache(slot_of, schedule, depth, self._fill), buffers, below)
        self._backend = backend
        self._host = below
        self._timeline = timeline or Timeline(backend)
        self._names = names
        self._nbytes = {unit: sum(move.nbytes for move in moves[unit]) for unit in slot_of}
        self._copies = {
            unit: [
                (
                    self.buffer_of(unit)[move.target : move.target + move.nbytes],
                    below.buffer_of(unit)[move.source : move.source + move.nbytes],
                )
                for move in moves[unit]
            ]
            for unit in slot_of
        }
        self._ready = [backend.event() for _ in sizes]
        self._free = [backend.event() for _ in sizes]
        self._copied = [backend.event() for _ in below.buffers]
        self._stream = backend.copy_stream(stream)
        self._waits = ComputeWaits(backend)
        self._queue: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._travelling: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._read_from: set[int] = set()
        """Host slots whose copies have not been seen to end."""
        self._returned = threading.Condition()
        self._threads: tuple[threading.Thread, ...] = ()
        self._lost: RuntimeError | None = None

    def acquire(self, unit: int, phase: Phase = Phase.FORWARD) -> int:
        """Device slot that the compute stream may read once it has waited; see `SlotCache.acquire`."""
        waiting = self._waits.begin()
        slot = self.cache.acquire(unit, phase)
        self._backend.compute_stream().wait_event(self._ready[slot])
        self._waits.end(waiting)
        self._backend.ready_for_compute()
        return slot

    @property
    def wait_seconds(self) -> float:
        """Seconds the compute stream stood still for weights, as far as it has come."""
        return self._waits.seconds

    def release(self, unit: int) -> None:
        """Let the slot be overwritten once the compute stream has come here."""
        self._backend.compute_stream().record_event(self._free[self.cache.slot_of[unit]])
        self.cache.release(unit)

    def stop(self) -> None:
        """End the threads after what is queued and under way; they start again with the next load."""
        threads, self._threads = self._threads, ()
        if threads:
            self._queue.put(None)
            if threading.current_thread() not in threads:  # where the collector ends a forgotten store
                for thread in threads:
                    thread.join()

    def _fill(self, load: Load) -> None:
        self._queue.put(load)
        if not self._threads:
            self._threads = (
                threading.Thread(target=self._copy_loads, name="lema-copier", daemon=True),
                threading.Thread(target=self._return_slots, name="lema-returner", daemon=True),
            )
            for thread in self._threads:
                thread.start()

    # -- the copier --------------------------------------------------------------------------------

    def _copy_loads(self) -> None:
        while (load := self._queue.get()) is not None:
            self._wait_for_host_slot(self._host.cache.slot_of[load.unit])
            if load.cancelled or self._lost is not None:
                self.cache.finished(load, self._lost)
                continue
            try:
                host_slot = self._host.acquire(load.unit, load.phase)
            except LemaError as error:
                self.cache.finished(load, error)
                continue
            try:
                self._enqueue(load, host_slot)
            except RuntimeError as error:  # torch's, when the device failed
                self._host.release(load.unit)
                self.cache.finished(load, error)
                continue
            self.copied_bytes += self._nbytes[load.unit]
            self._read_from.add(host_slot)
            self._travelling.put(load.unit)
            self.cache.finished(load)
        self._travelling.put(None)

    def _wait_for_host_slot(self, slot: int) -> None:
        with self._returned:
            self._returned.wait_for(lambda: slot not in self._read_from or self._lost is not None)

    def _enqueue(self, load: Load, host_slot: int) -> None:
        self._stream.wait_event(self._free[load.slot])
        with self._timeline.span(COPY, self._names(load.unit), self._nbytes[load.unit], self._stream):
            for target, source in self._copies[load.unit]:
                self._backend.copy(target, source, self._stream)
        for event in (self._copied[host_slot], self._ready[load.slot]):
            self._stream.record_event(event)

    # -- the returner ------------------------------------------------------------------------------

    def _return_slots(self) -> None:
        while (unit := self._travelling.get()) is not None:
            slot = self._host.cache.slot_of[unit]
            try:
                self._copied[slot].synchronize()
            except RuntimeError as error:  # the copy may still read the host slot, which is never released then
                self._lost = error
            else:
                self._host.release(unit)
            with self._returned:
                self._read_from.discard(slot)
                self._returned.notify_all()
