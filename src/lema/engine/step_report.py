"""What a step did, in numbers.

It knows counters of the process and the device; it knows nothing of what a step computes.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..machine.device import peak_memory
from ..machine.heap import resident_bytes
from ..streaming.weight_store import MemoryStats


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the last `train_step` or `eval_step` did."""

    step_seconds: float
    """From the call to its return."""
    wait_seconds: float
    """Seconds the computation waited for weights."""
    bytes_read: int
    """Bytes of weights read from disk."""
    loads: int
    """Units brought into slots."""
    peak_bytes: int
    """Most memory held so far: device memory on an accelerator, else the process's resident set."""
    num_targets: int
    """Tokens that were predicted."""
    bytes_copied: int = 0
    """Bytes of weights copied to the device."""
    host_bytes: int = 0
    """The process's resident set after the step."""
    grad_norm: float | None = None
    """Global norm before clipping; None where the optimizer did not step."""
    skipped: bool = False
    """Whether an fp16 overflow skipped the update and lowered the loss scale."""


def report_of(used: MemoryStats, seconds: float, device: str, targets: int, outcome: Mapping[str, Any]) -> StepReport:
    """What a step did, from what memory did meanwhile and what the update says of itself."""
    return StepReport(
        step_seconds=seconds,
        wait_seconds=used.wait_seconds,
        bytes_read=used.bytes_read,
        loads=used.loads,
        bytes_copied=used.bytes_copied,
        peak_bytes=peak_bytes(device),
        host_bytes=resident_bytes(),
        num_targets=targets,
        **outcome,
    )


def peak_bytes(device: str) -> int:
    """Most memory held so far: allocated on an accelerator, on the CPU resident in RAM."""
    if torch.device(device).type != "cpu":
        return peak_memory(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
