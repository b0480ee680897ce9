"""What is asked of a device: buffers, streams, events and copies, as a protocol.

Real devices and the simulated one of the tests differ only below it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class TimingEvent(Protocol):
    """A mark in a stream that knows when it was reached."""

    def query(self) -> bool:
        """Whether it has been reached."""

    def synchronize(self) -> None:
        """Block until it has been reached."""

    def seconds_after(self, earlier: Any, /) -> float:
        """Seconds from another mark to this one, both reached."""


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
            buffer: uint8 `[n]` of `views.page_aligned`, never a mapped file.
        """

    def unpin(self, buffer: torch.Tensor, /) -> None:
        """Undo `pin`, before the memory is freed and after its copies have ended; nothing where it was refused."""

    def close(self) -> None:
        """Wait for the copy streams and unpin what is pinned."""
