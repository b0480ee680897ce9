"""`lema report`: one HTML file that shows a run.

It knows options; what the page shows is the report room's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="File to write. Default: report.html in RUN."),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the file in the browser.")] = False,
) -> None:
    """Write one HTML file of a run: curves, a timeline of one step, samples, events, data and settings.

    The file needs no network. The run may still be going on; write the file again to see more.

    Example: lema report output --open
    """
    from ..report import write_report

    written = write_report(run, out)
    for note in written.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(str(written.path))
    if open_it:
        typer.launch(written.path.absolute().as_uri())
