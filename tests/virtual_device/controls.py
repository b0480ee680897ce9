"""What a test may do with the virtual device and ask of it."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from . import NAME


@dataclass(frozen=True)
class Blocking:
    """A call in which the host waited for the device."""

    kind: str
    """'copy', 'item', 'values' (a shape that depends on them), 'event', 'stream', 'device' or 'allocation'; or
    'emulation', where a card would not have waited."""
    name: str
    nbytes: int
    thread: str
    stack: tuple[str, ...]
    """File, line and function of Python, the call last."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} ({self.nbytes} bytes) on {self.thread}\n  " + "\n  ".join(self.stack[-6:])


class Controls:
    """The fixture `virtual`.

    Args:
        compiled: from `register`.
    """

    def __init__(self, compiled: ModuleType) -> None:
        self._compiled = compiled
        self._capacity = compiled.capacity()
        self.device = torch.device(NAME, 0)

    @contextlib.contextmanager
    def delays(
        self, *, to_device: float = 0.0, to_host: float = 0.0, on_device: float = 0.0, operation: float = 0.0
    ) -> Iterator[None]:
        """Hold up each copy of a kind, or each operation, for so many seconds; at the end all work is awaited."""
        self._compiled.set_delays(to_device, to_host, on_device, operation)
        try:
            yield
            self._compiled.synchronize()
        finally:
            self._compiled.set_delays(0.0, 0.0, 0.0, 0.0)

    @contextlib.contextmanager
    def capacity(self, nbytes: int) -> Iterator[None]:
        """Let the device have so many bytes."""
        self._compiled.limit(nbytes)
        try:
            yield
        finally:
            self._compiled.limit(self._capacity)

    @contextlib.contextmanager
    def blocking_calls(self) -> Iterator[list[Blocking]]:
        """The calls of the block in which the host waits for the device, of all threads, as they come."""
        calls: list[Blocking] = []

        def report(kind: str, name: str, nbytes: int) -> None:
            frames = traceback.extract_stack()[:-1]
            stack = tuple(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
            calls.append(Blocking(kind, name, nbytes, threading.current_thread().name, stack))

        self._compiled.report_blocking_to(report)
        try:
            yield calls
        finally:
            self._compiled.report_blocking_to(None)

    def take_faults(self) -> list[str]:
        """What the device saw that no correct program does, since the last call; what is left fails the test."""
        return self._compiled.take_faults()

    def reset(self) -> None:
        """As it was at first."""
        self._compiled.set_delays(0.0, 0.0, 0.0, 0.0)
        self._compiled.report_blocking_to(None)
        self._compiled.limit(self._capacity)
