"""The command `lema`: its verbs, and how errors leave it.

Nothing in this room imports torch, directly or through another room, until a verb runs: `lema --help` must be quick.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import LemaError
from .adapter import adapter
from .chat import chat
from .data import data
from .doctor import doctor
from .eval import evaluate
from .export import export
from .extensions import Extensible, add_verbs
from .generate import generate
from .init import init
from .merge import merge
from .paths import expands_paths
from .plan import plan
from .prepare import prepare
from .report import report
from .streams import replace_what_does_not_fit
from .train import train


class Verbs(Extensible):
    """The verbs. Whatever happens ends in a message and status 1; `LEMA_DEBUG=1` shows the traceback as well.

    Usage errors end with status 2 and Ctrl-C with 130, which is typer's doing.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the verb asked for."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever read the output has had enough; typer ends quietly
            raise
        except (LemaError, OSError) as error:
            if _debugging():
                traceback.print_exc()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except Exception as error:
            if _debugging() or type(error).__module__.partition(".")[0] in ("typer", "click"):
                raise
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            typer.echo(
                f"error: {said[:500]}\nThis was not foreseen, and is LEMA's fault: LEMA_DEBUG=1 before the command "
                "shows where it happened, which a report of it needs",
                err=True,
            )
            raise typer.Exit(1) from error


app = typer.Typer(name="lema", cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command("init")(expands_paths(init))
app.command("plan")(expands_paths(plan))
app.command("train")(expands_paths(train))
app.command("eval")(expands_paths(evaluate))
app.command("generate")(expands_paths(generate))
app.command("chat")(expands_paths(chat))
app.command("merge")(expands_paths(merge))
app.command("export")(expands_paths(export))
app.add_typer(adapter, name="adapter")
app.add_typer(data, name="data")
app.command("report")(expands_paths(report))
app.command("prepare")(expands_paths(prepare))
app.command("doctor")(expands_paths(doctor))
add_verbs({"": app, "data": data})


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lema {__version__}")
        raise typer.Exit()


@app.callback()
def lema(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Fine-tune language models larger than memory: frozen weights stream from disk, layer by layer."""


def _debugging() -> bool:
    return os.environ.get("LEMA_DEBUG", "") not in ("", "0")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line, the process's own unless words are given, and end the process with its status."""
    replace_what_does_not_fit()
    app(words)
