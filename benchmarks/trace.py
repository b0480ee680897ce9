"""A timeline of one training step for Perfetto or Chrome: reads, copies, computation and waits, a lane each.

It knows the engine's own recorder and what torch's profiler writes; it knows nothing of what a step
computes. Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lema.streaming.timeline import COMPUTE, COPY, DISK, LANES, WAIT

from .counters import Device

STEP = "training step"
_COPIES = {"gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Span:
    """Something that took from `start` to `end`, in seconds of one clock, on one row of a kind of lane."""

    kind: str
    row: str
    name: str
    start: float
    end: float


@contextlib.contextmanager
def listening(memory: Any) -> Iterator[list[Span]]:
    """Record what a memory manager reads, copies, computes and waits for while the block runs; known after it."""
    spans: list[Span] = []
    with memory.timeline.recording() as seen:
        yield spans
    for kind in LANES:
        own = [span for span in seen.spans if span.lane == kind]
        for span, row in zip(own, rows((span.start, span.end) for span in own), strict=True):
            name = f"{span.nbytes} bytes of {span.name}" if span.nbytes else span.name
            spans.append(Span(kind, f"{kind} {row + 1}", name, seen.started + span.start, seen.started + span.end))


def record(step: Callable[[], float], memory: Any, device: Device, path: Path) -> dict[str, Any]:
    """Take one step and write its timeline.

    Args:
        path: a `.json.gz` file.

    Returns:
        Seconds of the step, and seconds in which each kind of lane was busy.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU]
    if device.place.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with listening(memory) as spans, profile(activities=activities) as profiled:
        started = time.perf_counter()
        with record_function(STEP):
            step()
            device.synchronize()
        ended = time.perf_counter()
    seen = _of_device(profiled, started)
    every = [Span(STEP, "all of it", STEP, started, ended), *spans, *seen]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": list(_events(every, started)), "displayTimeUnit": "ms"}, file)
    lanes = {kind: [span for span in every if span.kind == kind] for kind in (DISK, COPY, WAIT)}
    lanes[COMPUTE] = [span for span in seen or spans if span.kind == COMPUTE]  # the device's kernels where it has any
    return {
        "file": path.name,
        "step_seconds": round(ended - started, 4),
        **{f"{kind}_seconds": round(busy(found), 4) for kind, found in lanes.items()},
    }


def rows(spans: Iterable[tuple[float, float]]) -> list[int]:
    """Row of every span so that those which overlap lie in different ones, as few rows as can be.

    Args:
        spans: start and end, in the order of their starts.
    """
    free_from: list[float] = []
    found = []
    for start, end in spans:
        row = next((number for number, free in enumerate(free_from) if free <= start), len(free_from))
        if row == len(free_from):
            free_from.append(end)
        free_from[row] = end
        found.append(row)
    return found


def busy(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans was under way."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda one: one.start):
        total += max(span.end - max(span.start, reached), 0.0)
        reached = max(reached, span.end)
    return total


def _of_device(profiled: Any, started: float) -> list[Span]:
    """What the profiler saw on the device, on the clock of the spans: both know when the step began."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    marks = [event for event in events if event.get("name") == STEP and event.get("cat") == "user_annotation"]
    if not marks:
        return []
    shift = started - float(marks[0]["ts"]) / 1e6
    spans = []
    for event in events:
        kind = COPY if event.get("cat") in _COPIES else COMPUTE if event.get("cat") == "kernel" else None
        if kind is None or event.get("ph") != "X":
            continue
        begun = float(event["ts"]) / 1e6 + shift
        row = f"stream {event.get('args', {}).get('stream', event.get('tid'))}"
        spans.append(Span(kind, row, str(event["name"]), begun, begun + float(event["dur"]) / 1e6))
    return spans


def _events(spans: Iterable[Span], started: float) -> Iterator[dict[str, Any]]:
    """Trace events: a process for every kind of lane, a thread for every row."""
    threads: dict[tuple[str, str], int] = {}
    kinds = [STEP, WAIT, COMPUTE, COPY, DISK]
    for span in spans:
        process = kinds.index(span.kind) + 1
        if (span.kind, span.row) not in threads:
            threads[span.kind, span.row] = len(threads) + 1
            for name, value in (("process_name", span.kind), ("thread_name", span.row)):
                thread = threads[span.kind, span.row]
                yield {"ph": "M", "name": name, "pid": process, "tid": thread, "args": {"name": value}}
        yield {
            "ph": "X", "name": span.name, "cat": span.kind, "pid": process, "tid": threads[span.kind, span.row],
            "ts": round((span.start - started) * 1e6, 3), "dur": round((span.end - span.start) * 1e6, 3),
        }  # fmt: skip
