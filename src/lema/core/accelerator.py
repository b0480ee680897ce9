"""The real device: CUDA, ROCm, XPU or whatever else torch calls an accelerator.

It knows torch's streams, events and copies, and how host memory is pinned; it knows nothing of slots,
layers or when something is copied.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..errors import DeviceError, StreamingError
from .binding import keep_from_children
from .layout import PAGE
from .transport import Event, Stream

logger = logging.getLogger(__name__)

ALIGNMENT = 256
PIECE_BYTES = 32 << 20
"""Bytes of one transfer: small ones of other streams get in between, and a piece still takes a millisecond."""
STAGING_BYTES = 16 << 20
"""Of each staging buffer; a power of two, to which torch's allocator of pinned memory rounds up."""

_LONGEST_WAIT = 600.0
_POLL_SECONDS = 0.0002
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of this process


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


class DeviceEvent(torch.Event):
    """An event whose wait sleeps between looks: torch's own spins, and takes a core from the readers."""

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
                    f"{self.device} did not finish its work within {_LONGEST_WAIT:.0f} seconds. If it is not merely "
                    "slow, look for errors of its driver (dmesg) and start again"
                )
            time.sleep(_POLL_SECONDS)

    def seconds_after(self, earlier: DeviceEvent) -> float:
        """Seconds from another event to this one; both have timing and have been reached."""
        return float(earlier.elapsed_time(self)) / 1000


class HostPins:
    """Host memory registered with CUDA's or ROCm's driver, in place and exactly as large as it is.

    It keeps what it pinned alive: memory freed while registered could never be registered again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def add(self, buffer: torch.Tensor) -> str:
        """Register a `binding.page_aligned` buffer; why that was refused, or nothing.

        Raises:
            StreamingError: some of the memory is pinned already.
        """
        start, nbytes = buffer.data_ptr(), buffer.numel() * buffer.dtype.itemsize
        assert buffer.device.type == "cpu" and buffer.is_contiguous(), "only flat host memory can be pinned"
        assert start % PAGE == 0, "memory that shares pages with other memory must not be pinned"
        with self._lock:
            if any(start < at + held.numel() and at < start + nbytes for at, held in self._buffers.items()):
                raise StreamingError("the same host memory was pinned twice")
            if self._device.type != "cuda":
                return f"torch cannot register memory for {self._device.type}"
            with torch.cuda.device(self._device):
                result = int(torch.cuda.cudart().cudaHostRegister(start, nbytes, _PORTABLE))
            if result != 0:
                _clear_error(self._device)
                return f"CUDA error {result}"
            self._buffers[start] = buffer.detach().view(torch.uint8)
            keep_from_children(self._buffers[start])
            return ""

    def remove(self, buffer: torch.Tensor) -> None:
        """Unregister a buffer; nothing if it is not registered."""
        with self._lock:
            if (held := self._buffers.pop(buffer.data_ptr(), None)) is not None:
                self._unregister(held)

    def clear(self) -> None:
        """Unregister everything."""
        with self._lock:
            while self._buffers:
                self._unregister(self._buffers.popitem()[1])

    def hold(self, host: torch.Tensor) -> bool:
        """Whether uint8 `[n]` on the host lies in registered memory."""
        start, end = host.data_ptr(), host.data_ptr() + host.numel()
        with self._lock:
            return any(at <= start and end <= at + held.numel() for at, held in self._buffers.items())

    def _unregister(self, held: torch.Tensor) -> None:
        with torch.cuda.device(self._device):
            result = int(torch.cuda.cudart().cudaHostUnregister(held.data_ptr()))
        keep_from_children(held, False)
        if result != 0:
            _clear_error(self._device)
            logger.warning("unpinning host memory failed with CUDA error %d", result)


def _clear_error(device: torch.device) -> None:
    """Take back an error that was handled: CUDA remembers it, and torch would report it at its next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


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
            self._streams = {"weights": torch.Stream(self.device)}
        except RuntimeError as error:  # no such index, or a kind of device without streams
            raise DeviceError(f"device {str(device)!r} cannot be used: {error}") from error
        self._pins = HostPins(self.device)
        self._staged: StagedCopier | None = None
        self._refused = False
        self._lock = threading.Lock()
        weakref.finalize(self, _shut_down, self.device, self._streams, self._pins)

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
        return DeviceEvent(self.device, enable_timing=False)

    def timing_event(self) -> DeviceEvent:
        """A new event, with timing."""
        return DeviceEvent(self.device, enable_timing=True)

    def copy_stream(self, name: str = "weights") -> torch.Stream:
        """The stream of this name; the same name gives the same stream."""
        with self._lock:
            if name not in self._streams:
                self._streams[name] = torch.Stream(self.device)
            return self._streams[name]

    def compute_stream(self) -> torch.Stream:
        """The current stream of the calling thread."""
        return torch.accelerator.current_stream(self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: torch.Stream) -> None:
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
        """Register the pages of a `binding.page_aligned` buffer with the driver.

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
        """Wait for the copy streams and unpin what is pinned. May be called again."""
        _shut_down(self.device, self._streams, self._pins)

    def _enqueue(self, target: torch.Tensor, source: torch.Tensor, stream: torch.Stream) -> None:
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
def _current(stream: torch.Stream) -> Iterator[None]:
    """Make a stream the current one of this thread, and put back stream and device as they were.

    Not `with stream:`, which torch 2.6 lacks and which keeps what it puts back on the stream object, where
    two threads would find each other's.
    """
    outer = torch.accelerator.current_stream()
    if outer == stream:
        yield
        return
    inner = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(inner)
        if outer != inner:
            torch.accelerator.set_stream(outer)


def _reach(device: torch.device, stream: torch.Stream) -> None:
    event = DeviceEvent(device, enable_timing=False)
    stream.record_event(event)
    event.synchronize()


def _shut_down(device: torch.device, streams: dict[str, torch.Stream], pins: HostPins) -> None:
    try:
        for stream in streams.values():
            _reach(device, stream)
    except RuntimeError:
        logger.exception("%s failed while its transfers were awaited", device)
    pins.clear()
