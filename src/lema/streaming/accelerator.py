"""The real device: CUDA, ROCm, XPU or whatever else torch calls an accelerator.

It knows torch's streams, events and copies; it knows nothing of slots, layers or when something is copied.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DeviceError
from ..storage.layout import ALIGNMENT
from .backend import Event, Stream
from .pins import HostPins

logger = logging.getLogger(__name__)

PIECE_BYTES = 32 << 20
"""Bytes of one transfer: small ones of other streams get in between, and a piece still takes a millisecond."""
STAGING_BYTES = 16 << 20
"""Of each staging buffer; a power of two, to which torch's allocator of pinned memory rounds up."""

_LONGEST_WAIT = 600.0
_POLL_SECONDS = 0.0002


class StagedCopier:
    """Copies between the device and host memory that is not pinned, through two pinned buffers in turn.

    The host moves one piece while the device moves the other. Both ways return when the host's memory is
    its owner's again: read to the end, or written to the end. The calling thread waits meanwhile; the
    device does not. May be called from several threads, one copy goes after the other.

    Args:
        buffers: two pinned uint8 `[n]` of one size.
        events: two, for nobody else.
        enqueue: puts a copy between device and pinned memory on a stream and returns.
    """

    def __init__(
        self,
        buffers: Sequence[torch.Tensor],
        events: Sequence[Event],
        enqueue: Callable[[torch.Tensor, torch.Tensor, Any], None],
    ) -> None:
        self._places = list(zip(buffers, events, strict=True))
        self._enqueue = enqueue
        self._lock = threading.Lock()

    def to_device(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Copy host bytes to the device: everything is read on return, the last two pieces still travel.

        Args:
            target: uint8 `[n]` on the device.
            source: uint8 `[n]` on the host.
        """
        with self._lock:
            for start, end in self._pieces(source):
                buffer, event = self._turn()
                event.synchronize()
                buffer[: end - start].copy_(source[start:end])
                self._enqueue(target[start:end], buffer[: end - start], stream)
                stream.record_event(event)

    def to_host(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Copy bytes of the device to the host: everything has arrived on return.

        Args:
            target: uint8 `[n]` on the host.
            source: uint8 `[n]` on the device.
        """
        with self._lock:
            travelling: tuple[torch.Tensor, torch.Tensor, Event] | None = None
            for start, end in self._pieces(source):
                buffer, event = self._turn()
                event.synchronize()
                self._enqueue(buffer[: end - start], source[start:end], stream)
                stream.record_event(event)
                _arrive(travelling)
                travelling = target[start:end], buffer[: end - start], event
            _arrive(travelling)

    def _pieces(self, data: torch.Tensor) -> list[tuple[int, int]]:
        return cut(data.numel(), self._places[0][0].numel())

    def _turn(self) -> tuple[torch.Tensor, Event]:
        self._places.reverse()
        return self._places[0]


def _arrive(travelling: tuple[torch.Tensor, torch.Tensor, Event] | None) -> None:
    if travelling is not None:
        target, buffer, event = travelling
        event.synchronize()
        target.copy_(buffer)


def cut(nbytes: int, piece: int) -> list[tuple[int, int]]:
    """Start and end of the pieces of a run of bytes."""
    return [(start, min(start + piece, nbytes)) for start in range(0, nbytes, piece)]


class DeviceEvent:
    """An event whose wait sleeps between looks: torch's own spins, and takes a core from the readers.

    It holds torch's event instead of being one: `torch.Stream` takes `torch.Event` itself and no subclass of it.

    Args:
        device: with an index.
        enable_timing: whether it knows when it was reached.
    """

    __slots__ = ("raw",)

    def __init__(self, device: torch.device, *, enable_timing: bool = False) -> None:
        self.raw = torch.Event(device, enable_timing=enable_timing)
        """Torch's own."""

    def query(self) -> bool:
        """Whether the last record has been reached; never recorded counts as reached."""
        return bool(self.raw.query())

    def synchronize(self) -> None:
        """Block until the last record has been reached.

        Raises:
            DeviceError: not within ten minutes.
            RuntimeError: torch's, when the device failed.
        """
        give_up = time.monotonic() + _LONGEST_WAIT
        while not self.query():
            if time.monotonic() > give_up:
                raise DeviceError(
                    f"{self.raw.device} did not finish its work within {_LONGEST_WAIT:.0f} seconds. If it is not "
                    "merely slow, look for errors of its driver (dmesg) and start again"
                )
            time.sleep(_POLL_SECONDS)

    def seconds_after(self, earlier: DeviceEvent) -> float:
        """Seconds from another event to this one; both have timing and have been reached."""
        return float(earlier.raw.elapsed_time(self.raw)) / 1000


@dataclass(frozen=True, slots=True)
class DeviceStream:
    """A stream of torch's that takes `DeviceEvent`s; equal to another of the same stream."""

    raw: torch.Stream
    """Torch's own."""

    def wait_event(self, event: DeviceEvent) -> None:
        """Let later work of this stream start only after the event."""
        self.raw.wait_event(event.raw)

    def record_event(self, event: DeviceEvent) -> None:
        """Mark this place of the stream in the event."""
        self.raw.record_event(event.raw)


class AcceleratorBackend:
    """Buffers, streams, events and copies of one torch accelerator.

    Layout: one stream a kind of transfer, made when first asked for; device buffers from torch's caching
    allocator; host memory pinned in place, by registering it, so that it is exactly as large as it was.

    Mechanics: a copy makes its stream the current one of the calling thread and calls `copy_` in large
    pieces. The allocator knows only of the compute stream, so a new buffer is handed out when everything
    before it on that stream has ended: its memory may have been another tensor's a moment ago. What
    cannot be pinned (other accelerators than CUDA and ROCm, or the system refuses) is staged.

    Args:
        device: with or without an index, such as `cuda:1`.

    Raises:
        DeviceError: torch sees no such device.
    """

    def __init__(self, device: str | torch.device) -> None:
        wanted = torch.device(device)
        present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if present is None or present.type != wanted.type:
            found = "no accelerator" if present is None else f"only {present.type}"
            raise DeviceError(f"device {str(device)!r} was asked for, but torch {torch.__version__} sees {found} here")
        try:
            self.device = torch.empty(0, device=wanted).device
            self._streams = {"weights": DeviceStream(torch.Stream(self.device))}
        except RuntimeError as error:  # no such index, or a kind of device without streams
            raise DeviceError(f"device {str(device)!r} cannot be used: {error}") from error
        self._pins = HostPins(self.device)
        self._staged: StagedCopier | None = None
        self._refused = False
        self._lock = threading.Lock()
        weakref.finalize(self, _shut_down, self.device, self._pins)

    def device_buffer(self, nbytes: int) -> torch.Tensor:
        """Device memory as uint8 `[nbytes]`, its start a multiple of 256. Waits for the compute stream."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if shift := -buffer.data_ptr() % ALIGNMENT:
            padded = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
            shift = -padded.data_ptr() % ALIGNMENT
            buffer = padded[shift : shift + nbytes]
        _reach(self.device, self.compute_stream())
        return buffer

    def event(self) -> DeviceEvent:
        """A new event, without timing."""
        return DeviceEvent(self.device)

    def timing_event(self) -> DeviceEvent:
        """A new event, with timing."""
        return DeviceEvent(self.device, enable_timing=True)

    def copy_stream(self, name: str = "weights") -> DeviceStream:
        """The stream of this name; the same name gives the same stream."""
        with self._lock:
            if name not in self._streams:
                self._streams[name] = DeviceStream(torch.Stream(self.device))
            return self._streams[name]

    def compute_stream(self) -> DeviceStream:
        """The current stream of the calling thread."""
        return DeviceStream(torch.accelerator.current_stream(self.device))

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: DeviceStream) -> None:
        """Enqueue a copy; see `DeviceBackend.copy` for what the two may be."""
        host = target if target.device.type == "cpu" else source
        if host.device.type != "cpu":
            with _current(stream):
                target.copy_(source, non_blocking=True)
        elif self._pins.hold(host) or host.is_pinned():
            self._enqueue(target, source, stream)
        elif host is source:
            self._staging().to_device(target, source, stream)
        else:
            self._staging().to_host(target, source, stream)

    def ready_for_compute(self) -> None:
        """Nothing: what computes is enqueued on the stream that waits."""

    def pin(self, buffer: torch.Tensor) -> bool:
        """Register the pages of a `views.page_aligned` buffer with the driver.

        False where that is refused, after one line in the log; the staging buffers are allocated then, so
        that no copy has to.

        Raises:
            StreamingError: some of the memory is pinned already.
        """
        reason = self._pins.add(buffer)
        if not reason:
            return True
        if not self._refused:
            self._refused = True
            logger.warning(
                "pinning %d bytes of host memory was refused (%s): copies to and from %s go through %d MiB of staging "
                "memory, which is slower",
                buffer.numel(),
                reason,
                self.device,
                2 * STAGING_BYTES >> 20,
            )
        self._staging()
        return False

    def unpin(self, buffer: torch.Tensor) -> None:
        """Undo `pin`; nothing if the buffer is not pinned. Its copies must have ended."""
        self._pins.remove(buffer)

    def close(self) -> None:
        """Wait for the device and unpin what is pinned. May be called again."""
        _shut_down(self.device, self._pins)

    def _enqueue(self, target: torch.Tensor, source: torch.Tensor, stream: DeviceStream) -> None:
        with _current(stream):
            for start, end in cut(target.numel(), PIECE_BYTES):
                target[start:end].copy_(source[start:end], non_blocking=True)

    def _staging(self) -> StagedCopier:
        with self._lock:
            if self._staged is None:
                buffers = [_staging_buffer() for _ in range(2)]
                self._staged = StagedCopier(buffers, [self.event(), self.event()], self._enqueue)
            return self._staged


def _staging_buffer() -> torch.Tensor:
    """Pinned memory; ordinary memory where there is none at all: the driver then stages once more, as safely."""
    try:
        return torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        logger.warning("no pinned memory can be had, not even %d MiB: %s", STAGING_BYTES >> 20, error)
        return torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu")


@contextlib.contextmanager
def _current(stream: DeviceStream) -> Iterator[None]:
    """Make a stream the current one of this thread, and put back stream and device as they were.

    Not `with stream:`, which torch 2.6 lacks and which keeps what it puts back on the stream object, where
    two threads would find each other's.
    """
    outer = torch.accelerator.current_stream()
    if outer == stream.raw:
        yield
        return
    inner = torch.accelerator.current_stream(stream.raw.device)
    torch.accelerator.set_stream(stream.raw)
    try:
        yield
    finally:
        torch.accelerator.set_stream(inner)
        if outer != inner:
            torch.accelerator.set_stream(outer)


def _reach(device: torch.device, stream: DeviceStream) -> None:
    event = DeviceEvent(device)
    stream.record_event(event)
    event.synchronize()


def _shut_down(device: torch.device, pins: HostPins) -> None:
    try:
        torch.accelerator.synchronize(device)  # every stream: what computes may copy from pinned memory, too
    except RuntimeError:
        logger.exception("%s failed while its transfers were awaited", device)
    pins.clear()
