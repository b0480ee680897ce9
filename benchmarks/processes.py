"""Runs arms as processes, one at a time, in alternating order.

It knows how a process ended and what it printed; it does not know what the numbers mean. It imports neither
torch nor transformers, so this parent stays small beside what it measures.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .memory_group import MemoryGroup

ROOT = Path(__file__).resolve().parents[1]
Option = str | int | float | Sequence[str]


@dataclass(frozen=True)
class Arm:
    """What to run: a kind that a module knows, the label it has in the report, and its options."""

    label: str
    kind: str
    folder: Path
    options: Mapping[str, Option]
    """A list stands for an option given several times."""
    limit_bytes: int | None = None
    """Run inside a memory group of this size."""
    module: str = "benchmarks.arms"

    def command(self) -> list[str]:
        """The arm's command line."""
        words = []
        for name, value in self.options.items():
            several = value if isinstance(value, list | tuple) else [value]
            words += [word for one in several for word in (f"--{name}", str(one))]
        return [sys.executable, "-m", self.module, self.kind, "--folder", str(self.folder), *words]


@dataclass
class Run:
    """What became of one arm once."""

    label: str
    pair: int
    exit_code: int | None
    numbers: dict[str, Any] | None = None
    """What the arm printed; None if it failed."""
    failure: str | None = None
    group: dict[str, int | None] | None = None
    load_before: float | None = None
    """The machine's one-minute load average before the arm began."""
    options: dict[str, Option] = field(default_factory=dict)


class NotPrepared(SystemExit):
    """Something a benchmark needs could not be made; ends it with one message, unless it can do without."""


def execute(
    command: Sequence[str], timeout: float | None = None, join: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line in the repository's root to its end; `join` is called in the process before it begins."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, preexec_fn=join)


def run_arm(arm: Arm, pair: int, timeout: float) -> Run:
    """Run one arm to its end; a failure is part of the result, not an exception."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    if arm.limit_bytes is None:
        run = _run(arm, pair, timeout, None)
    else:
        with MemoryGroup(arm.limit_bytes) as group:
            run = _run(arm, pair, timeout, group.join)
            run.group = group.facts()
            if run.failure and run.group["out_of_memory_kills"]:
                run.failure += (
                    f"; its memory group counts {run.group['out_of_memory_kills']} kill(s) for want of memory"
                )
    run.load_before = load
    run.options = dict(arm.options)
    return run


def alternate(
    arms: Sequence[Arm], pairs: int, timeout: float, before: Callable[[Arm], None] | None = None
) -> Iterator[Run]:
    """Every arm once in each pair, in turns forwards and backwards, so that drift falls on all of them.

    Args:
        before: called before each arm.
    """
    for pair in range(pairs):
        for arm in arms if pair % 2 == 0 else reversed(arms):
            if before is not None:
                before(arm)
            run = run_arm(arm, pair, timeout)
            describe(run)
            yield run


def describe(run: Run) -> None:
    """Say on stderr how an arm went."""
    said = run.failure
    if said is None:
        numbers = run.numbers or {}
        parts = {"s/step": "median_step_seconds", "MiB above imports": "above_floor_mib", "MiB VRAM": "device_peak_mib"}
        said = ", ".join(f"{numbers[key]:.6g} {unit}" for unit, key in parts.items() if numbers.get(key) is not None)
    print(f"  pair {run.pair + 1}, {run.label}: {said or 'done'}", file=sys.stderr, flush=True)


def run_module(module: str, *arguments: str, timeout: float | None = None) -> str:
    """Run a module that prepares something, and return what it printed.

    Raises:
        NotPrepared: it failed, with the end of what it said, or took too long.
    """
    try:
        ended = execute([sys.executable, "-m", module, *arguments], timeout)
    except subprocess.TimeoutExpired:
        raise NotPrepared(f"{module} had not finished after {timeout:.0f} s") from None
    if ended.returncode != 0:
        raise NotPrepared(f"{module} failed (exit {ended.returncode}):\n{ended.stderr.strip()[-2000:]}")
    return ended.stdout.strip()


def _run(arm: Arm, pair: int, timeout: float, join: Callable[[], None] | None) -> Run:
    try:
        ended = execute(arm.command(), timeout, join)
    except subprocess.TimeoutExpired:
        return Run(arm.label, pair, None, failure=f"not finished after {timeout:.0f} s, ended by the benchmark")
    except subprocess.SubprocessError:
        return Run(arm.label, pair, None, failure="could not be started inside its memory group")
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        steps = sum(line.startswith("step ") for line in ended.stderr.splitlines())
        return Run(
            arm.label, pair, ended.returncode, failure=f"killed by {name} (exit {ended.returncode}), {steps} steps done"
        )
    if ended.returncode != 0:
        last = _without_paths(" / ".join(ended.stderr.strip().splitlines()[-3:]), arm.folder)
        return Run(arm.label, pair, ended.returncode, failure=f"exit {ended.returncode}: {last}")
    return Run(arm.label, pair, 0, numbers=json.loads(ended.stdout.strip().splitlines()[-1]))


def _without_paths(text: str, folder: Path) -> str:
    """A message without this machine's folders, since reports are published."""
    known = {str(folder): "MODEL", str(ROOT): ".", sys.prefix: "VENV", sys.base_prefix: "PYTHON"}
    known |= {str(Path.home()): "~", tempfile.gettempdir(): "TMP"}
    for path in sorted(known, key=len, reverse=True):
        if len(path) > 1:
            text = text.replace(path, known[path])
    return text
