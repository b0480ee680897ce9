"""A device made of threads, whose streams and events mean exactly what a GPU's do, at the worst time.

Copies happen late and beside everything else, a wait takes the event's last record at the time of the
call, an event never recorded is complete. Work that reads bytes before their copy ended, a copy over
bytes somebody still reads, and bytes changed under a copy that reads them are caught and raised. It
knows nothing of models.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator

import torch

from lema.errors import StreamingError
from lema.streaming.accelerator import StagedCopier

_POISON = 0xFF
_LONGEST_WAIT = 60.0
"""Seconds; who waits longer than this waits for something that will not come."""

Span = tuple[int, int]


class SimulatedEvent:
    """Completion flags of its last record."""

    def __init__(self) -> None:
        self.last: threading.Event | None = None
        self.reached_at = 0.0

    def reach(self, flag: threading.Event) -> None:
        self.reached_at = time.perf_counter()
        flag.set()

    def seconds_after(self, earlier: SimulatedEvent) -> float:
        return self.reached_at - earlier.reached_at

    def query(self) -> bool:
        return self.last is None or self.last.is_set()

    def synchronize(self) -> None:
        if self.last is not None and not self.last.wait(_LONGEST_WAIT):
            raise StreamingError(f"an event was not reached within {_LONGEST_WAIT:.0f} seconds")


def _reached(flag: threading.Event) -> None:
    flag.wait(_LONGEST_WAIT)


class SimulatedStream:
    """A thread that works through a queue, with a pause drawn before each item."""

    def __init__(self, name: str, pause: Callable[[], float]) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pause = pause
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def enqueue(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def wait_event(self, event: SimulatedEvent) -> None:
        recorded = event.last
        if recorded is not None:
            self.enqueue(lambda: _reached(recorded))

    def record_event(self, event: SimulatedEvent) -> None:
        flag = threading.Event()
        event.last = flag
        self.enqueue(lambda: event.reach(flag))

    def drain(self) -> None:
        event = SimulatedEvent()
        self.record_event(event)
        event.synchronize()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            pause = self._pause()
            if pause:
                time.sleep(pause)
            work()
            del work  # a waiting thread must not keep memory alive


class SimulatedDevice:
    """Backend of a device without hardware.

    Its device memory is ordinary memory, and so is what a model computes with: every copy on the compute
    stream stays on the device, every copy on another stream is between device and host.

    Args:
        seed: of the pauses.
        longest_pause: seconds a piece of work is delayed at most.
        blocking: `ready_for_compute` waits for the compute stream, so that ordinary torch code, which
            runs when it is called, may read the slots. Otherwise reads go through `read`.
        pinning_refused: `pin` refuses, and every copy between device and host is staged.
        staging_bytes: size of each of the two staging buffers.
    """

    def __init__(
        self,
        seed: int = 0,
        longest_pause: float = 0.002,
        blocking: bool = True,
        *,
        pinning_refused: bool = False,
        staging_bytes: int = 1024,
    ) -> None:
        self._random = random.Random(seed)
        self._longest = longest_pause
        self._blocking = blocking
        self._lock = threading.Lock()
        self._reading: list[Span] = []
        self._copying: list[Span] = []
        self._pinned: dict[Span, torch.Tensor] = {}
        self._device_buffers: list[torch.Tensor] = []
        self._streams: dict[str, SimulatedStream] = {}
        self.faults: list[str] = []
        self.pins = 0
        self._copy = self._streams["weights"] = SimulatedStream("lema-sim-copy", self._pause)
        self._compute = SimulatedStream("lema-sim-compute", self._pause)
        self._staged: StagedCopier | None = None
        if pinning_refused:
            buffers = [torch.empty(staging_bytes, dtype=torch.uint8) for _ in range(2)]
            self._staged = StagedCopier(buffers, [self.event(), self.event()], self._enqueue)

    def device_buffer(self, nbytes: int) -> torch.Tensor:
        buffer = torch.full((nbytes,), _POISON, dtype=torch.uint8)
        if self._staged is not None:
            self._device_buffers.append(buffer)  # their addresses tell the two sides of a staged copy apart
        return buffer

    def event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def timing_event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def copy_stream(self, name: str = "weights") -> SimulatedStream:
        with self._lock:
            if name not in self._streams:
                self._streams[name] = SimulatedStream(f"lema-sim-copy-{name}", self._pause)
            return self._streams[name]

    def compute_stream(self) -> SimulatedStream:
        return self._compute

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        if self._staged is None or stream is self._compute:
            self._enqueue(target, source, stream)
        elif any(_overlap(_span(target), _span(buffer)) for buffer in self._device_buffers):
            self._staged.to_device(target, source, stream)
        else:
            self._staged.to_host(target, source, stream)

    def ready_for_compute(self) -> None:
        if self._blocking:
            self._compute.drain()
            self.check()

    def pin(self, buffer: torch.Tensor) -> bool:
        """Count a pin, or refuse it.

        Raises:
            StreamingError: some of the memory is pinned already.
        """
        with self._lock:
            if any(_overlap(_span(buffer), pinned) for pinned in self._pinned):
                raise StreamingError("the same memory was pinned twice")
            if self._staged is not None:
                return False
            self.pins += 1
            self._pinned[_span(buffer)] = buffer
            return True

    def unpin(self, buffer: torch.Tensor) -> None:
        with self._lock:
            if self._pinned.pop(_span(buffer), None) is not None and any(
                _overlap(_span(buffer), busy) for busy in self._reading + self._copying
            ):
                self.faults.append("memory was unpinned while it was copied")

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are pinned now."""
        with self._lock:
            return sum(end - start for start, end in self._pinned)

    def read(self, source: torch.Tensor, use: Callable[[torch.Tensor], None]) -> None:
        """Enqueue work on the compute stream that reads a slot for a while."""
        self._compute.enqueue(lambda: self._do_read(source, use))

    def check(self) -> None:
        """Raise what the streams caught so far."""
        if self.faults:
            raise StreamingError("; ".join(self.faults))

    def close(self) -> None:
        """End all streams after what is queued, and raise what they caught."""
        for stream in (*self._streams.values(), self._compute):
            stream.close()
        self._pinned.clear()
        self.check()

    def _pause(self) -> float:
        with self._lock:
            return self._random.random() * self._longest if self._random.random() < 0.5 else 0.0

    def _sleep(self) -> None:
        pause = self._pause()
        if pause:
            time.sleep(pause)

    def _enqueue(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        stream.enqueue(lambda: self._do_copy(target, source))

    def _do_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._reads(source, "a copy read its source before the copy that fills it had ended"):
            with self._writes(target):
                seen = source.clone()
                target.fill_(_POISON)
                self._sleep()
                if not _same_bytes(source, seen):
                    self.faults.append("the source of a copy was overwritten while it was read")
                target.copy_(source)

    def _do_read(self, source: torch.Tensor, use: Callable[[torch.Tensor], None]) -> None:
        with self._reads(source, "a slot was read before its copy had ended"):
            self._sleep()
            use(source)

    @contextlib.contextmanager
    def _reads(self, source: torch.Tensor, fault: str) -> Iterator[None]:
        span = _span(source)
        with self._lock:
            if any(_overlap(span, busy) for busy in self._copying):
                self.faults.append(fault)
            self._reading.append(span)
        try:
            yield
        finally:
            with self._lock:
                self._reading.remove(span)

    @contextlib.contextmanager
    def _writes(self, target: torch.Tensor) -> Iterator[None]:
        span = _span(target)
        with self._lock:
            if any(_overlap(span, busy) for busy in self._reading):
                self.faults.append("a slot was overwritten while it was read")
            if any(_overlap(span, busy) for busy in self._copying):
                self.faults.append("two copies wrote the same bytes at once")
            self._copying.append(span)
        try:
            yield
        finally:
            with self._lock:
                self._copying.remove(span)


def _span(tensor: torch.Tensor) -> Span:
    """First address and the one after the last of a tensor's elements."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.dtype.itemsize


def _overlap(a: Span, b: Span) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)))
