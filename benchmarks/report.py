"""From runs to a result: facts of the machine, medians, ratios, and the two files of a report.

It knows numbers and text; it does not know what is compared, which each benchmark says itself.
"""

from __future__ import annotations

import argparse
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

from .processes import ROOT, Run

OUT = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True)
class Ratio:
    """One figure: the median over pairs of what one arm needed, divided by what another did in the same pair."""

    name: str
    pairs: tuple[float, ...]
    target: float | None = None
    """At most this is wanted."""

    @property
    def median(self) -> float | None:
        """None if no pair had both arms."""
        return statistics.median(self.pairs) if self.pairs else None

    @property
    def verdict(self) -> str:
        """Whether the target is met, in words."""
        if self.median is None:
            return "not measured"
        if self.target is None:
            return "no target"
        return "met" if self.median <= self.target else "missed"


@dataclass
class Report:
    """All there is to say about one run of a benchmark."""

    name: str
    title: str
    command: str
    runs: list[Run] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    """Further lines of results, in words."""
    notes: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Every arm that did not finish."""
        return [f"{run.label}, pair {run.pair + 1}: {run.failure}" for run in self.runs if run.failure]


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


def ratio(runs: Sequence[Run], name: str, key: str, over: str, under: str, target: float | None = None) -> Ratio:
    """The ratio of a number of the arm labelled `over` to that of `under`, pair by pair."""
    values: dict[tuple[str, int], float] = {
        (run.label, run.pair): run.numbers[key] for run in runs if run.numbers is not None
    }
    pairs = sorted({pair for _, pair in values})
    both = [pair for pair in pairs if (over, pair) in values and (under, pair) in values]
    return Ratio(name, tuple(values[over, pair] / values[under, pair] for pair in both), target)


def median_of(runs: Sequence[Run], label: str, key: str) -> float | None:
    """Median over pairs of a number of one arm; None if it never finished."""
    found = [run.numbers[key] for run in runs if run.label == label and run.numbers is not None]
    found = [value for value in found if value is not None]
    return statistics.median(found) if found else None


def loss_note(runs: Sequence[Run]) -> str:
    """Whether the arms did the same work: adapters begin as zero, so the first loss is the base model's own."""
    by_arm = {run.label: run.numbers["losses"][0] for run in runs if run.numbers is not None}
    if len(by_arm) < 2:
        return "Fewer than two arms finished, so losses cannot be compared."
    losses = by_arm.values()
    spread = (max(losses) - min(losses)) / max(losses)
    same = "agree" if spread < 0.01 else "DO NOT AGREE, so the arms did not do the same work"
    return f"First-step losses of the arms {same}: {min(losses):.5f} to {max(losses):.5f}."


def command_line(module: str, options: argparse.Namespace) -> str:
    """The command with every setting that was in effect; paths of this machine are left out."""
    words = [f"python -m {module}"]
    for name, value in vars(options).items():
        if isinstance(value, Path) or value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def common_options(module: str, description: str, pairs: int, steps: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("--pairs", type=int, default=pairs, help="rounds of all arms (default: %(default)s)")
    made.add_argument(
        "--steps", type=int, default=steps, help="steps an arm, the first warms up (default: %(default)s)"
    )
    made.add_argument("--tokens", type=int, default=512)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--timeout", type=int, default=1800, help="seconds an arm may take (default: %(default)s)")
    made.add_argument("--out", type=Path, default=OUT, help="where the report goes (default: docs/benchmarks)")
    return made


def check_common(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage message where numbers make no sense."""
    if options.pairs < 1 or options.steps < 2:
        made.error("--pairs must be 1 or more and --steps 2 or more: the first step only warms up")


def write(report: Report, out: Path) -> int:
    """Write `<name>-<date>.json` and `.md`, print the Markdown; a run of the same day is replaced.

    Returns:
        Exit status: 1 if a ratio could not be measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    machine = environment()
    content = {
        "benchmark": report.name,
        "date": date,
        "command": report.command,
        "environment": machine,
        "ratios": [{**dataclasses.asdict(r), "median": r.median, "verdict": r.verdict} for r in report.ratios],
        "facts": report.facts,
        "failures": report.failures(),
        "notes": report.notes,
        "runs": [dataclasses.asdict(run) for run in report.runs],
    }
    base = out / f"{report.name}-{date}"
    base.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    text = markdown(report, date, machine)
    base.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {base.with_suffix('.md')} and .json", file=sys.stderr)
    return 1 if any(r.median is None for r in report.ratios) else 0


def markdown(report: Report, date: str, machine: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"# {report.title}", "", f"{date}, `{report.command}`", ""]
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB RAM, {machine['system']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "",
        "## Ratios",
        "",
    ]
    rows = [
        [r.name, _show(r.median), f"{_show(min(r.pairs))} to {_show(max(r.pairs))}" if r.pairs else "-",
         len(r.pairs), _show(r.target), r.verdict]
        for r in report.ratios
    ]  # fmt: skip
    lines += _table(["ratio", "median", "range", "pairs", "target, at most", "verdict"], rows)
    lines += ["", *(f"- {name}: {value}" for name, value in report.facts.items())]
    lines += ["", "## Failures", "", *(f"- {line}" for line in report.failures() or ["none"])]
    lines += ["", "## Medians of the arms", ""]
    keys = {
        "s/step": "median_step_seconds",
        "peak MiB above imports": "above_floor_mib",
        "peak MiB": "peak_mib",
        "imports MiB": "floor_mib",
        "anonymous MiB at end": "end_anonymous_mib",
        "file pages MiB at end": "end_file_mib",
    }
    labels = list(dict.fromkeys(run.label for run in report.runs))
    lines += _table(
        ["arm", *keys], [[x, *(_show(median_of(report.runs, x, k)) for k in keys.values())] for x in labels]
    )
    lines += ["", "## Every run", ""]
    raw = []
    for run in report.runs:
        n = run.numbers or {}
        steps = " ".join(_show(value) for value in n.get("timed_seconds", ())) or "-"
        raw.append([run.pair + 1, run.label, run.exit_code, steps, *(_show(n.get(k)) for k in keys.values()),
                    _show(run.load_before)])  # fmt: skip
    lines += _table(["pair", "arm", "exit", "timed steps, s", *keys, "load before"], raw)
    lines += ["", "The JSON file beside this one has every number.", "", "## Notes", ""]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def _proc_field(name: str, key: str) -> str | None:
    try:
        lines = Path("/proc", name).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
