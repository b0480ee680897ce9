"""What happened when in one step: reads, copies, computation and waiting, as spans of time in lanes.

It knows names, clocks and events; it knows nothing of what is read, copied or computed. Off, it costs one
attribute test a span.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StreamingError
from ..storage.atomic import write_text
from .backend import DeviceBackend, Stream, TimingEvent

DISK, COPY, COMPUTE, WAIT = "disk", "copy", "compute", "wait"
LANES = (DISK, COPY, COMPUTE, WAIT)
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start` to `end`, in seconds since the recording began."""

    lane: str
    name: str
    start: float
    end: float
    nbytes: int = 0
    """Bytes of the whole transfer."""
    cut: bool = False
    """Whether it began before the recording or went on after it."""


@dataclass(eq=False, slots=True)
class _Mark:
    """A span while it is recorded: its ends are moments of the host's clock or events of the device."""

    lane: str
    name: str
    nbytes: int
    began: float | TimingEvent
    ended: float | TimingEvent | None = None
    cut: bool = False


class Recording:
    """The spans of one step.

    Mechanics: what the host does is timed by its clock. What is enqueued on a device's stream is enclosed in two
    timing events, which are read when the step is over; nothing inside the step waits for them. The device has
    nothing to do when the recording begins, so an event recorded then ties its clock to the host's.

    Args:
        backend: the device; None: everything is the host's doing.
        step: number of the step.
    """

    def __init__(self, backend: DeviceBackend | None, step: int) -> None:
        self.step = step
        self.seconds = 0.0
        """From begin to end, the device's work included."""
        self.spans: list[Span] = []
        """In the order they began; filled when the recording ends."""
        self._backend = backend
        self._marks: list[_Mark] = []
        self._lock = threading.Lock()
        if backend is not None:
            self._now(None).synchronize()
        self.started = time.perf_counter()
        """By `time.perf_counter`."""
        self._origin = None if backend is None else self._now(None)

    def begin(self, lane: str, name: str, nbytes: int, began: float | TimingEvent) -> _Mark:
        """Note that something began."""
        mark = _Mark(lane, name, nbytes, began)
        with self._lock:
            self._marks.append(mark)
        return mark

    @contextlib.contextmanager
    def around(self, lane: str, name: str, nbytes: int, stream: Stream | None) -> Iterator[None]:
        """Record what the block computes, or enqueues on a stream; None: the one the calling thread computes on."""
        on_device = self._backend is not None
        mark = self.begin(lane, name, nbytes, self._now(stream) if on_device else time.perf_counter())
        yield
        mark.ended = self._now(stream) if on_device else time.perf_counter()

    def finish(self) -> None:
        """Wait for the device and turn marks into spans."""
        if self._backend is not None:
            self._now(None).synchronize()
        self.seconds = time.perf_counter() - self.started
        with self._lock:
            marks = list(self._marks)
        spans = [self._resolved(mark) for mark in marks]
        self.spans = sorted((span for span in spans if span.start <= self.seconds), key=lambda span: span.start)

    def busy(self, lane: str) -> float:
        """Seconds in which at least one span of a lane was under way."""
        total, reached = 0.0, 0.0
        for span in self.spans:
            if span.lane == lane:
                total += max(span.end - max(span.start, reached), 0.0)
                reached = max(reached, span.end)
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: step, seconds, and lanes of spans with name, start, end and, where bytes moved, their number."""
        return {
            "step": self.step,
            "seconds": round(self.seconds, 6),
            "lanes": [
                {"name": lane, "spans": [_as_dict(span) for span in self.spans if span.lane == lane]} for lane in LANES
            ],
        }

    def _now(self, stream: Stream | None) -> TimingEvent:
        assert self._backend is not None
        event = self._backend.timing_event()
        (stream if stream is not None else self._backend.compute_stream()).record_event(event)
        return event

    def _resolved(self, mark: _Mark) -> Span:
        ended = mark.ended
        start, end = self._second(mark.began), self.seconds if ended is None else self._second(ended)
        cut = mark.cut or ended is None or end > self.seconds
        return Span(mark.lane, mark.name, max(start, 0.0), max(min(end, self.seconds), start), mark.nbytes, cut)

    def _second(self, moment: float | TimingEvent) -> float:
        if isinstance(moment, float):
            return moment - self.started
        moment.synchronize()
        return moment.seconds_after(self._origin)


class Transfer:
    """One read, begun and ended by whichever threads do it."""

    def __init__(self, timeline: Timeline, lane: str, name: str, nbytes: int) -> None:
        self._timeline = timeline
        self._what = lane, name, nbytes
        self._begun: tuple[Recording, _Mark] | None = None

    def begin(self) -> None:
        """The first byte is asked for."""
        if (record := self._timeline.record) is not None:
            self._begun = record, record.begin(*self._what, time.perf_counter())

    def end(self, whole: bool) -> None:
        """No more comes; what is not whole was cancelled or failed."""
        if (record := self._timeline.record) is None:
            return
        if self._begun is None or self._begun[0] is not record:  # it began before the recording did
            mark = record.begin(*self._what, record.started)
            mark.cut = True
        else:
            mark = self._begun[1]
        if not whole:
            mark.name, mark.nbytes = f"{mark.name}, given up", 0
        mark.ended = time.perf_counter()


class Timeline:
    """Where spans are told; they are kept while a recording is under way.

    Args:
        backend: the device; None: computed by the host.
    """

    def __init__(self, backend: DeviceBackend | None = None) -> None:
        self.record: Recording | None = None
        """The recording under way."""
        self._backend = backend

    def span(
        self, lane: str, name: str, nbytes: int = 0, stream: Stream | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Enclose work of the calling thread: what it computes, or enqueues on a stream (None: the compute stream)."""
        record = self.record
        return _NOTHING if record is None else record.around(lane, name, nbytes, stream)

    def transfer(self, lane: str, name: str, nbytes: int) -> Transfer:
        """A span whose begin and end are told apart."""
        return Transfer(self, lane, name, nbytes)

    @contextlib.contextmanager
    def recording(self, step: int = 0) -> Iterator[Recording]:
        """Record what happens in the block, ideally one step; the recording can be read after it.

        The device's streams are awaited before and after the block, never inside. An error that leaves the block
        leaves the recording empty.

        Raises:
            StreamingError: a recording is under way already.
        """
        if self.record is not None:
            raise StreamingError("a timeline is being recorded already: end that recording first")
        self.record = record = Recording(self._backend, step)
        try:
            yield record
        finally:
            self.record = None
        record.finish()

    @contextlib.contextmanager
    def recorded_to(self, path: str | os.PathLike[str], step: int) -> Iterator[Recording]:
        """Like `recording`, and writes it as a JSON file, whole or not at all."""
        with self.recording(step) as record:
            yield record
        write_text(Path(path), json.dumps(record.to_dict()))


def _as_dict(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {"name": span.name, "start": round(span.start, 6), "end": round(span.end, 6)}
    if span.nbytes:
        found["bytes"] = span.nbytes
    if span.cut:
        found["cut"] = True
    return found
