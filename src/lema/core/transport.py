"""From host slots to device slots: the second tier, written once for every kind of device.

The transport knows streams, events and buffers; it knows nothing of files, layers or schedules. A
`DeviceBackend` is the thin layer below it: real devices and the simulated one of the tests differ only there.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import LemaError
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

    @property
    def seconds(self) -> float:
        """Sum of the waits that are over."""
        while self._open and self._open[0][1].query():
            pair = self._open.popleft()
            self._seconds += pair[1].seconds_after(pair[0])
            self._spare.append(pair)
        return self._seconds


class DeviceTier:
    """Device slots filled from host slots by one copier thread.

    Layout: as many device slots as the ring has, a `ready` and a `free` event each. The ring before
    (host slots) is visited once for every device load.

    Mechanics: the copier takes a load, acquires the unit in the host ring, lets the copy stream wait
    for `free` and enqueues the copy, then records `ready` and reports the load, so an `acquire` can
    only find recorded events. It then waits for that copy alone before it releases the host slot. The
    user's `acquire` makes the compute stream wait for `ready`; `release` records `free` on it before the
    ring may plan the next load of the slot. So every wait comes after the record it is meant for.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        host: Ring,
        host_buffers: list[torch.Tensor],
        slot_of: dict[int, int],
        schedule: Schedule,
        depth: int | None,
        nbytes: dict[int, int],
        stream: str = "weights",
    ) -> None:
        num_slots = max(slot_of.values(), default=-1) + 1
        sizes = [max(nbytes[u] for u, slot in slot_of.items() if slot == number) for number in range(num_slots)]
        self.buffers = [backend.device_buffer(size) for size in sizes]
        self.copied_bytes = 0
        self.timeline = Timeline(backend)
        self.names: Callable[[int], str] = "unit {}".format
        """What the timeline calls a unit."""
        self._backend = backend
        self._host = host
        self._host_buffers = host_buffers
        self._nbytes = nbytes
        self._ready = [backend.event() for _ in range(num_slots)]
        self._free = [backend.event() for _ in range(num_slots)]
        self._stream = backend.copy_stream(stream)
        self._waits = ComputeWaits(backend)
        self._queue: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
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
        """End the copier after what is queued; it starts again with the next load."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():  # where the collector ends a forgotten manager
                thread.join()

    def _fill(self, load: Load) -> None:
        self._queue.put(load)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lema-copier", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (load := self._queue.get()) is not None:
            if load.cancelled or self._lost is not None:
                self.ring.finished(load, self._lost)
                continue
            try:
                host_slot = self._host.acquire(load.unit, load.phase)
            except LemaError as error:
                self.ring.finished(load, error)
                continue
            nbytes = self._nbytes[load.unit]
            target, source = self.buffers[load.slot][:nbytes], self._host_buffers[host_slot][:nbytes]
            try:
                self._stream.wait_event(self._free[load.slot])
                with self.timeline.span(COPY, self.names(load.unit), nbytes, self._stream):
                    self._backend.copy(target, source, self._stream)
                self._stream.record_event(self._ready[load.slot])
            except RuntimeError as error:  # torch's, when the device failed
                self._host.release(load.unit)
                self.ring.finished(load, error)
                continue
            self.copied_bytes += nbytes
            self.ring.finished(load)
            try:
                self._ready[load.slot].synchronize()
            except RuntimeError as error:  # the copy may still read the host slot, which is never released then
                self._lost = error
                continue
            self._host.release(load.unit)
