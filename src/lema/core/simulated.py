"""A device made of threads, whose streams and events mean exactly what a GPU's do, at the worst time.

Copies happen late and beside everything else, a wait takes the event's last record at the time of the
call, an event never recorded is complete. Work that reads bytes before their copy ended, or a copy over
bytes somebody still reads, is caught and raised. For tests and dry runs; it knows nothing of models.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

import torch

from ..errors import StreamingError

_POISON = 0xFF


class SimulatedEvent:
    """Completion flags of its last record."""

    def __init__(self) -> None:
        self.last: threading.Event | None = None

    def synchronize(self) -> None:
        if self.last is not None:
            self.last.wait()


def _reached(flag: threading.Event) -> None:
    flag.wait()


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
        self.enqueue(flag.set)

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


class SimulatedDevice:
    """Backend of a device without hardware.

    Args:
        seed: of the pauses.
        longest_pause: seconds a piece of work is delayed at most.
        blocking: `ready_for_compute` waits for the compute stream, so that ordinary torch code, which
            runs when it is called, may read the slots. Otherwise reads go through `read`.
    """

    def __init__(self, seed: int = 0, longest_pause: float = 0.002, blocking: bool = True) -> None:
        self._random = random.Random(seed)
        self._longest = longest_pause
        self._blocking = blocking
        self._lock = threading.Lock()
        self._readers: dict[int, int] = {}
        self._copying: set[int] = set()
        self.faults: list[str] = []
        self._copy = SimulatedStream("lema-sim-copy", self._pause)
        self._compute = SimulatedStream("lema-sim-compute", self._pause)

    def device_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), _POISON, dtype=torch.uint8)

    def event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def copy_stream(self) -> SimulatedStream:
        return self._copy

    def compute_stream(self) -> SimulatedStream:
        return self._compute

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        stream.enqueue(lambda: self._do_copy(target, source))

    def ready_for_compute(self) -> None:
        if self._blocking:
            self._compute.drain()
            self.check()

    def read(self, source: torch.Tensor, use: Callable[[torch.Tensor], None]) -> None:
        """Enqueue work on the compute stream that reads a slot for a while."""
        self._compute.enqueue(lambda: self._do_read(source, use))

    def check(self) -> None:
        """Raise what the streams caught so far."""
        if self.faults:
            raise StreamingError("; ".join(self.faults))

    def close(self) -> None:
        """End both streams after what is queued, and raise what they caught."""
        self._copy.close()
        self._compute.close()
        self.check()

    def _pause(self) -> float:
        with self._lock:
            return self._random.random() * self._longest if self._random.random() < 0.5 else 0.0

    def _do_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        key = target.data_ptr()
        with self._lock:
            if self._readers.get(key):
                self.faults.append("a slot was overwritten while it was read")
            self._copying.add(key)
        target.fill_(_POISON)
        pause = self._pause()
        if pause:
            time.sleep(pause)
        target.copy_(source)
        with self._lock:
            self._copying.discard(key)

    def _do_read(self, source: torch.Tensor, use: Callable[[torch.Tensor], None]) -> None:
        key = source.data_ptr()
        with self._lock:
            if key in self._copying:
                self.faults.append("a slot was read before its copy had ended")
            self._readers[key] = self._readers.get(key, 0) + 1
        pause = self._pause()
        if pause:
            time.sleep(pause)
        use(source)
        with self._lock:
            self._readers[key] -= 1
