"""`lema doctor`: what this machine can do for a run, what is wrong with it, and the fix for each.

It knows how to print findings; gathering and judging are `lema.doctor`'s.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

_COLOURS = {"ok": typer.colors.GREEN, "advice": typer.colors.YELLOW, "problem": typer.colors.RED}


def doctor(
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A model's directory or file: the disk it is on is measured and looked at."),
    ] = None,
    output_dir: Annotated[str, typer.Option(metavar="DIR", help="Where runs will be written.")] = "output",
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure disk, link and arithmetic: a few seconds, once.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Look at Python, torch, device, memory, disks and hub; each finding with its fix. Status 1 if one is a problem.

    Example: lema doctor --model ./mistral-7b
    """
    from ..doctor import Level, examine, gather

    findings = examine(gather(model, output_dir, measure))
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if as_json:
        found = [{**dataclasses.asdict(finding), "level": finding.level.value} for finding in findings]
        typer.echo(json.dumps({"findings": found, "problems": problems}, indent=2))
    else:
        for finding in findings:
            level = typer.style(f"{finding.level.value:<8}", fg=_COLOURS[finding.level.value])
            typer.echo(f"{level} {finding.topic:<10} {finding.message}")
            if finding.fix:
                typer.echo(f"{'':19} fix: {finding.fix}")
        advised = sum(finding.level is Level.ADVICE for finding in findings)
        typer.echo(f"\n{problems} problem{'s' * (problems != 1)}, {advised} to improve")
    if problems:
        raise typer.Exit(1)
