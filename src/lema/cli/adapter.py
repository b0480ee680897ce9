"""`lema adapter check`: what programs that load adapters would say of one.

It knows options and how findings are shown; the rules are the export room's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json
from .paths import expands_paths

if TYPE_CHECKING:
    from ..export.check import Finding

_COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}


class Reader(str, Enum):
    """Whose rules count."""

    PEFT = "PEFT"
    VLLM = "vLLM"
    LLAMA_CPP = "llama.cpp"


adapter = typer.Typer(no_args_is_help=True)


@adapter.callback()
def _adapter() -> None:
    """Adapters on disk.

    Example: lema adapter check runs/mine/final
    """


@adapter.command()
@expands_paths
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The adapter's directory.", show_default=False)],
    readers: Annotated[
        list[Reader] | None,
        typer.Option("--for", case_sensitive=False, help="Only the rules of this one; repeatable. Default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold an adapter against the rules of PEFT, vLLM and llama.cpp; status 1 if there is a problem.

    Example: lema adapter check runs/mine/final --for vllm
    """
    from ..export.check import check_adapter

    wanted = {reader.value for reader in readers or Reader}
    findings = [finding for finding in check_adapter(directory) if finding.reader in wanted]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        show_findings(findings)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def show_findings(findings: Sequence[Finding]) -> None:
    """One line a finding, and what to do below it."""
    for finding in findings:
        level = typer.style(f"{finding.level:<8}", fg=_COLOURS[finding.level])
        typer.echo(f"{level} {finding.reader:<10} {finding.what}")
        if finding.advice:
            typer.echo(f"{'':<20}-> {finding.advice}")
