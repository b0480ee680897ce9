"""From runs to a result: ratios, checked claims, and the files of a report.

It knows numbers and text; it does not know what is compared, which each benchmark says itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .markdown import markdown
from .plots import Panel, draw
from .processes import Run


@dataclass(frozen=True)
class Ratio:
    """One figure: the median over pairs of what one arm needed, divided by what others did in the same pair."""

    name: str
    pairs: tuple[float, ...]
    target: float | None = None
    at_least: bool = False
    """Whether the target is the least that is wanted, not the most."""

    @property
    def median(self) -> float | None:
        """None if no pair had all the arms."""
        return statistics.median(self.pairs) if self.pairs else None

    @property
    def verdict(self) -> str:
        """Whether the target is met, in words."""
        if self.median is None:
            return "not measured"
        if self.target is None:
            return "no target"
        met = self.median >= self.target if self.at_least else self.median <= self.target
        return "met" if met else "missed"

    @property
    def wanted(self) -> str:
        """The target in words."""
        return "-" if self.target is None else f"{'at least' if self.at_least else 'at most'} {self.target:g}"


@dataclass(frozen=True)
class Check:
    """A claim that the runs prove or refute."""

    claim: str
    holds: bool | None
    """None where arms it needs did not finish."""
    detail: str = ""

    @property
    def verdict(self) -> str:
        """In words."""
        return "could not be checked" if self.holds is None else "holds" if self.holds else "DOES NOT HOLD"


@dataclass(frozen=True)
class Table:
    """Further results, row by row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Report:
    """All there is to say about one run of a benchmark."""

    name: str
    title: str
    command: str
    runs: list[Run] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    """Further lines of results, in words."""
    notes: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    """What the plot shows."""
    complete: bool = True
    """False while stages are still to come."""
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).date().isoformat())

    @property
    def stem(self) -> str:
        """What its files are called."""
        return f"{self.name}-{self.date}"

    def failures(self) -> list[str]:
        """Every arm that did not finish."""
        return [f"{run.label}, pair {run.pair + 1}: {run.failure}" for run in self.runs if run.failure]

    def failed(self) -> bool:
        """Whether something could not be measured or a claim does not hold."""
        return any(r.median is None for r in self.ratios) or any(check.holds is not True for check in self.checks)


def number(run: Run, key: str) -> float | None:
    """A number of a run, `a.b` for one inside another; None where there is none."""
    value: Any = run.numbers
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def by_pair(runs: Sequence[Run], label: str, key: str) -> dict[int, float]:
    """A number of one arm in every pair it finished in."""
    found = {run.pair: number(run, key) for run in runs if run.label == label}
    return {pair: value for pair, value in found.items() if value is not None}


def median_of(runs: Sequence[Run], label: str, key: str) -> float | None:
    """Median over pairs of a number of one arm; None if it never finished."""
    found = by_pair(runs, label, key)
    return statistics.median(found.values()) if found else None


def ratio(
    runs: Sequence[Run],
    name: str,
    key: str,
    over: str,
    under: str | Sequence[str],
    target: float | None = None,
    at_least: bool = False,
) -> Ratio:
    """A number of the arm labelled `over`, divided by that of `under` in the same pair, the largest of several."""
    unders = [under] if isinstance(under, str) else list(under)
    tops, bottoms = by_pair(runs, over, key), [by_pair(runs, label, key) for label in unders]
    both = [pair for pair in sorted(tops) if all(bottom.get(pair) for bottom in bottoms)]
    return Ratio(name, tuple(tops[p] / max(bottom[p] for bottom in bottoms) for p in both), target, at_least)


def within(runs: Sequence[Run], name: str, label: str, key: str, other: str, target: float | None = None) -> Ratio:
    """One number of an arm divided by another number of the same run."""
    tops, bottoms = by_pair(runs, label, key), by_pair(runs, label, other)
    return Ratio(name, tuple(tops[pair] / bottoms[pair] for pair in sorted(tops) if bottoms.get(pair)), target)


def loss_check(runs: Sequence[Run]) -> Check:
    """Whether the arms did the same work: adapters begin as zero, so the first loss is the base model's own."""
    found = [run.numbers["losses"][0] for run in runs if run.numbers and run.numbers.get("losses")]
    trained = [loss for loss in found if loss]  # arms that only read have none
    claim = "the first losses of all arms that train the same batch agree within 1%"
    if len(trained) < 2:
        return Check(claim, None, "fewer than two arms finished")
    return Check(claim, max(trained) - min(trained) < 0.01 * max(trained), f"{min(trained):.5f} to {max(trained):.5f}")


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    import lema  # without torch, which it imports lazily

    versions = {"python": platform.python_version(), "lema": lema.__version__}
    for package in ("torch", "transformers", "peft"):
        versions[package] = metadata.version(package)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = _proc_field("meminfo", "MemTotal")
    return {
        "cpu": _proc_field("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "ram_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def save(report: Report, out: Path) -> str:
    """Write `<name>-<date>.json`, `.md` and `.png`, each whole or not at all; a run of the same day is replaced.

    Returns:
        The Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = out / report.stem
    machine = environment()
    missing = draw(report.panels, base.with_name(f"{report.stem}.png"), report.title) if report.panels else None
    content = {
        "benchmark": report.name,
        "date": report.date,
        "complete": report.complete,
        "command": report.command,
        "environment": machine,
        "ratios": [{**dataclasses.asdict(r), "median": r.median, "verdict": r.verdict} for r in report.ratios],
        "checks": [{**dataclasses.asdict(c), "verdict": c.verdict} for c in report.checks],
        "facts": report.facts,
        "tables": [dataclasses.asdict(table) for table in report.tables],
        "failures": report.failures(),
        "notes": report.notes,
        "plot": missing or f"{report.stem}.png" if report.panels else None,
        "runs": [dataclasses.asdict(run) for run in report.runs],
    }
    text = markdown(report, machine, missing)
    _write_whole(base.with_name(f"{report.stem}.json"), json.dumps(content, indent=2) + "\n")
    _write_whole(base.with_name(f"{report.stem}.md"), text)
    return text


def write(report: Report, out: Path) -> int:
    """Save the report and print it.

    Returns:
        Exit status: 1 if a ratio could not be measured or a claim does not hold.
    """
    print(save(report, out))
    print(f"written: {out / report.stem}.md, .json and .png", file=sys.stderr)
    return int(report.failed())


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _proc_field(name: str, key: str) -> str | None:
    try:
        lines = Path("/proc", name).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
