"""`metrics.jsonl`, and other files of a run with one JSON object a line: appended, flushed, never half read.

It knows lines, and which numbers that of a step has.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..coordinator import Coordinator
from .engine import Batch, Report
from .state import TrainerState

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TIMELINE_FILE = "timeline.json"


@dataclass(frozen=True)
class Counts:
    """Of a step, over all ranks."""

    targets: int
    tokens: int
    dropped: int
    """Rows."""
    truncated: int
    """Rows."""

    @classmethod
    def of(cls, batch: Batch, ranks: Coordinator) -> Counts:
        """Each rank's batch added up."""
        own = [batch.targets, batch.tokens, getattr(batch, "dropped", 0), getattr(batch, "truncated", 0)]
        return cls(*ranks.totals("batch", own))


def train_line(state: TrainerState, counts: Counts, report: Report | None, **numbers: Any) -> dict[str, Any]:
    """What `metrics.jsonl` says of a step alone: tokens of all ranks, seconds and bytes of this one; no report: it was
    not made."""
    return {
        "step": state.global_step,
        "epoch": state.epoch,
        **numbers,
        "tokens": counts.tokens,
        "targets": counts.targets,
        "rows_dropped": counts.dropped,
        "rows_truncated": counts.truncated,
        "tokens_per_second": counts.tokens / max(numbers["step_seconds"], 1e-9),
        "wait_seconds": report.wait_seconds if report else 0.0,
        "bytes_read": report.bytes_read if report else 0,
        "bytes_copied": report.bytes_copied if report else 0,
        "peak_bytes": report.peak_bytes if report else 0,
        "host_bytes": report.host_bytes if report else 0,
    }


class JsonLines:
    """A file that objects are appended to, a line each, every line handed to the system at once.

    What a killed process left of its last line is cut off on opening.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_line(path)
        self.path = path
        self.resumed = path.is_file() and path.stat().st_size > 0
        """Whether there were lines already."""
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one object."""
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _cut_half_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - 4096, 0)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        file.truncate(end)
