"""From host slots to device slots: the second tier, written once for every kind of device.

The transport knows streams, events and buffers; it knows nothing of files, layers or schedules. A
`DeviceBackend` is the thin layer below it: real devices and the simulated one of the tests differ only there.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..errors import LemaError
from ..storage.layout import Move
from .ring import Load, Ring
from .schedule import Phase, Schedule
from .timeline import COPY, Timeline, TimingEvent


class Event(Protocol):
    """A mark in a stream. Waiting for it means its last record at the time of the call; never recorded is complete."""

    def synchronize(self) -> None:
        """Block the calling thread until the last record has been reached.

        Raises:
            RuntimeError: the device failed or did not get there in minutes; the wait ends in any case.
        """


class Stream(Protocol):
    """A queue of device work that runs in order, beside other streams. Events must be of the same backend."""

    def wait_event(self, event: Any, /) -> None:
        """Let later work of this stream start only after the event."""

    def record_event(self, event: Any, /) -> object:
        """Mark this place of the stream in the event."""


class DeviceBackend(Protocol):
    """What a device must offer: buffers, streams, events, a copy that does not block, and pinned host memory."""

    def device_buffer(self, nbytes: int) -> torch.Tensor:
        """Device memory as uint8 `[nbytes]`, which any stream may write at once. Not for the inside of a step."""

    def event(self) -> Event:
        """A new event."""

    def timing_event(self) -> TimingEvent:
        """A new event that knows when it was reached."""

    def copy_stream(self, name: str = "weights") -> Stream:
        """The stream for these transfers; the same name gives the same stream, and each has its own."""

    def compute_stream(self) -> Stream:
        """The stream the calling thread computes on."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any, /) -> None:
        """Enqueue a copy on a stream and return.

        Between tensors of the device of any equal shape and type, or between device and host, both uint8
        `[n]`. Where the host side is not pinned it goes through pinned staging buffers, and the call
        returns only when the host side may be changed again.
        """

    def ready_for_compute(self) -> None:
        """Called after work for the compute stream was enqueued; a backend whose compute is not a stream blocks."""

    def pin(self, buffer: torch.Tensor, /) -> bool:
        """Lock anonymous host memory, exactly its size, for copies that do not block; once, outside of steps.

        Returns False where the system refuses: copies of this memory are staged then.

        Args:
            buffer: uint8 `[n]` of `binding.page_aligned`, never a mapped file.
        """

    def unpin(self, buffer: torch.Tensor, /) -> None:
        """Undo `pin`, before the memory is freed and after its copies have ended; nothing where it was refused."""

    def close(self) -> None:
        """Wait for the copy streams and unpin what is pinned."""


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


class DeviceTier:
    """Device slots filled from host slots.

    Layout: as many device slots as the ring has, a `ready` and a `free` event each, and a `copied` event for every
    host slot. The ring before (host slots) is visited once for every device load.

    Mechanics: the copier thread takes a load, acquires the unit in the host ring, lets the copy stream wait
    for `free`, enqueues the copy, records `copied` and `ready` and reports the load, so an `acquire` can
    only find recorded events. It goes on to the next load at once: a copy waits for its slot, never for the copy
    before it. The returner thread waits for the copies in their order and releases each host slot behind its own;
    until then the copier does not ask for the slot again. The user's `acquire` makes the compute stream wait for
    `ready`; `release` records `free` on it before the ring may plan the next load of the slot. So every wait comes
    after the record it is meant for.

    Args:
        host: the ring before.
        host_buffers: its slots.
        slot_of: device slot of every unit.
        depth: visits planned ahead; None: as many as the slots allow.
        moves: how the bytes of a unit get from its host slot to its device slot.
        stream: of the copies.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        host: Ring,
        host_buffers: Sequence[torch.Tensor],
        slot_of: dict[int, int],
        schedule: Schedule,
        depth: int | None,
        moves: Mapping[int, Sequence[Move]],
        stream: str = "weights",
    ) -> None:
        sizes = [0] * (max(slot_of.values(), default=-1) + 1)
        for unit, slot in slot_of.items():
            sizes[slot] = max(sizes[slot], *(move.target + move.nbytes for move in moves[unit]), 0)
        self.buffers = [backend.device_buffer(size) for size in sizes]
        self.copied_bytes = 0
        self.timeline = Timeline(backend)
        self.names: Callable[[int], str] = "unit {}".format
        """What the timeline calls a unit."""
        self._backend = backend
        self._host = host
        self._nbytes = {unit: sum(move.nbytes for move in moves[unit]) for unit in slot_of}
        self._copies = {
            unit: [
                (
                    self.buffers[slot][move.target : move.target + move.nbytes],
                    host_buffers[host.slot_of[unit]][move.source : move.source + move.nbytes],
                )
                for move in moves[unit]
            ]
            for unit, slot in slot_of.items()
        }
        self._ready = [backend.event() for _ in sizes]
        self._free = [backend.event() for _ in sizes]
        self._copied = [backend.event() for _ in host_buffers]
        self._stream = backend.copy_stream(stream)
        self._waits = ComputeWaits(backend)
        self._queue: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._travelling: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._read_from: set[int] = set()
        """Host slots whose copies have not been seen to end."""
        self._returned = threading.Condition()
        self._threads: tuple[threading.Thread, ...] = ()
        self._lost: RuntimeError | None = None
        self.ring = Ring(slot_of, schedule, depth, self._fill)

    def acquire(self, unit: int, phase: Phase) -> int:
        """Device slot that the compute stream may read once it has waited; see `Ring.acquire`."""
        waiting = self._waits.begin()
        slot = self.ring.acquire(unit, phase)
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
        self._backend.compute_stream().record_event(self._free[self.ring.slot_of[unit]])
        self.ring.release(unit)

    def stop(self) -> None:
        """End the threads after what is queued and under way; they start again with the next load."""
        threads, self._threads = self._threads, ()
        if threads:
            self._queue.put(None)
            if threading.current_thread() not in threads:  # where the collector ends a forgotten manager
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
            self._wait_for_host_slot(self._host.slot_of[load.unit])
            if load.cancelled or self._lost is not None:
                self.ring.finished(load, self._lost)
                continue
            try:
                host_slot = self._host.acquire(load.unit, load.phase)
            except LemaError as error:
                self.ring.finished(load, error)
                continue
            try:
                self._enqueue(load, host_slot)
            except RuntimeError as error:  # torch's, when the device failed
                self._host.release(load.unit)
                self.ring.finished(load, error)
                continue
            self.copied_bytes += self._nbytes[load.unit]
            self._read_from.add(host_slot)
            self._travelling.put(load.unit)
            self.ring.finished(load)
        self._travelling.put(None)

    def _wait_for_host_slot(self, slot: int) -> None:
        with self._returned:
            self._returned.wait_for(lambda: slot not in self._read_from or self._lost is not None)

    def _enqueue(self, load: Load, host_slot: int) -> None:
        self._stream.wait_event(self._free[load.slot])
        with self.timeline.span(COPY, self.names(load.unit), self._nbytes[load.unit], self._stream):
            for target, source in self._copies[load.unit]:
                self._backend.copy(target, source, self._stream)
        for event in (self._copied[host_slot], self._ready[load.slot]):
            self._stream.record_event(event)

    # -- the returner ------------------------------------------------------------------------------

    def _return_slots(self) -> None:
        while (unit := self._travelling.get()) is not None:
            slot = self._host.slot_of[unit]
            try:
                self._copied[slot].synchronize()
            except RuntimeError as error:  # the copy may still read the host slot, which is never released then
                self._lost = error
            else:
                self._host.release(unit)
            with self._returned:
                self._read_from.discard(slot)
                self._returned.notify_all()
