"""The report for people: a report's numbers as Markdown.

It knows how a page is laid out; it computes medians for its tables and nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report

COLUMNS = {
    "s/step": "median_step_seconds",
    "peak MiB above imports": "above_floor_mib",
    "peak MiB": "peak_mib",
    "imports MiB": "floor_mib",
    "anonymous MiB at end": "end_anonymous_mib",
    "file pages MiB at end": "end_file_mib",
    "VRAM peak MiB": "device_peak_mib",
    "VRAM held MiB": "device_reserved_mib",
    "waiting share": "waiting_share",
}


def markdown(report: Report, machine: dict[str, Any], no_plot: str | None) -> str:
    """The whole page."""
    lines = [f"# {report.title}", "", f"{report.date}, `{report.command}`", ""]
    if not report.complete:
        lines += ["**Not complete: written between two stages.**", ""]
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB RAM, {machine['system']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    ]
    if report.panels:
        lines += ["", no_plot or f"![plot]({report.stem}.png)"]
    if report.ratios:
        rows = [
            [r.name, show(r.median), f"{show(min(r.pairs))} to {show(max(r.pairs))}" if r.pairs else "-",
             len(r.pairs), r.wanted, r.verdict]
            for r in report.ratios
        ]  # fmt: skip
        lines += ["", "## Ratios", "", *table(["ratio", "median", "range", "pairs", "target", "verdict"], rows)]
    if report.checks:
        rows = [[check.claim, check.verdict, check.detail] for check in report.checks]
        lines += ["", "## Claims checked on these runs", "", *table(["claim", "verdict", "detail"], rows)]
    for shown in report.tables:
        lines += ["", f"## {shown.title}", "", *table(shown.head, [[show(v) for v in row] for row in shown.rows])]
    if report.facts:
        lines += ["", "## Facts", "", *(f"- {name}: {value}" for name, value in report.facts.items())]
    lines += ["", "## Failures", "", *(f"- {line}" for line in report.failures() or ["none"])]
    lines += ["", "## Medians of the arms", "", *_medians(report), "", "## Every run", "", *_every_run(report)]
    lines += ["", "The JSON file beside this one has every number.", "", "## Notes", ""]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _used(report: Report) -> dict[str, str]:
    """The columns that some run has a number for."""
    return {
        name: key
        for name, key in COLUMNS.items()
        if any((run.numbers or {}).get(key) is not None for run in report.runs)
    }


def _medians(report: Report) -> list[str]:
    columns, rows = _used(report), []
    for label in dict.fromkeys(run.label for run in report.runs):
        row: list[object] = [label]
        for key in columns.values():
            found = [(run.numbers or {}).get(key) for run in report.runs if run.label == label]
            known = [value for value in found if value is not None]
            row.append(show(statistics.median(known) if known else None))
        rows.append(row)
    return table(["arm", *columns], rows)


def _every_run(report: Report) -> list[str]:
    columns, rows = _used(report), []
    for run in report.runs:
        numbers = run.numbers or {}
        steps = " ".join(show(value) for value in numbers.get("timed_seconds", ())) or "-"
        values = [show(numbers.get(key)) for key in columns.values()]
        rows.append([run.pair + 1, run.label, run.exit_code, steps, *values, show(run.load_before)])
    return table(["pair", "arm", "exit", "timed steps, s", *columns, "load before"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]


def show(value: object) -> str:
    """A number with as many digits as matter, a dash for nothing, text as it is."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    digits = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 else 5
    return f"{value:.{digits}f}"
