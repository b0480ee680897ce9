"""`lema doctor`: what this machine can do for a run, or what a model is found to be; and what is wrong, with its fix.

It knows how to print findings; gathering and judging are `lema.doctor`'s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import typer

from .settings import parse_settings

_COLOURS = {"ok": typer.colors.GREEN, "advice": typer.colors.YELLOW, "problem": typer.colors.RED}


def doctor(
    looked_at: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Say what this model is found to be, and nothing of the machine: a directory, a config.json or a hub "
            "id, of which only the configuration is fetched.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A model's directory or file: the disk it is on is measured and looked at."),
    ] = None,
    output_dir: Annotated[str, typer.Option(metavar="DIR", help="Where runs will be written.")] = "output",
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure disk, link and arithmetic: a few seconds, once.")
    ] = True,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Of MODEL: a setting of LemaConfig; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Look at Python, torch, device, memory, disks and hub; each finding with its fix. Status 1 if one is a problem.

    With MODEL: what it is found to be (layers, towers left out, where adapters go) without its weights, and status 1 if
    LEMA refuses to train it.

    Examples: lema doctor --model ./mistral-7b; lema doctor google/gemma-3-4b-it
    """
    if looked_at is not None:
        _about_model(looked_at, settings or (), as_json)
        return
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


def _about_model(model: str, settings: Sequence[str], as_json: bool) -> None:
    from ..config import LemaConfig
    from ..run.found import look_at

    found = look_at(LemaConfig.from_dict({"device": "cpu", **parse_settings(settings), "model_name_or_path": model}))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        from .model_table import rows_of

        for label, value in rows_of(found):
            typer.echo(f"{label:<10} {value}")
    if found.refused:
        raise typer.Exit(1)
