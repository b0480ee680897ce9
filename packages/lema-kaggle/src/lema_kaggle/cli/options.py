"""Options of the verbs of `lema kaggle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Name = Annotated[
    str,
    typer.Argument(
        metavar="NOTEBOOK", help="proof, smollm2, tinyllama, llama2, inference or benchmark.", show_default=False
    ),
]
Kernel = Annotated[
    str, typer.Argument(metavar="KERNEL", help="OWNER/SLUG, or the slug of one of yours.", show_default=False)
]
User = Annotated[
    str | None, typer.Option(metavar="NAME", help="Your Kaggle user name; default: as the credentials say.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default: kaggle/NOTEBOOK.")]
Title = Annotated[str | None, typer.Option(help="Of the kernel; its address is made of it.")]
Accelerator = Annotated[
    str | None,
    typer.Option(metavar="ID", help="NvidiaTeslaT4 (the default; two cards, one is used), NvidiaTeslaP100, ...; none."),
]
Hours = Annotated[
    float | None, typer.Option(help="Within which it ends by itself, training saved; at most 11. Default: its own.")
]
ResumeFrom = Annotated[
    str | None, typer.Option(metavar="OWNER/SLUG", help="Go on with the training that this kernel left unfinished.")
]
Attach = Annotated[list[str] | None, typer.Option("--kernel", metavar="OWNER/SLUG", help="Attach its outputs.")]
Dataset = Annotated[list[str] | None, typer.Option("--dataset", metavar="OWNER/SLUG", help="Attach a data set.")]
Public = Annotated[bool, typer.Option("--public", help="Everybody may read the notebook.")]
Internet = Annotated[
    bool, typer.Option("--internet/--no-internet", help="Without it models and packages have to be attached.")
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the notebook's first cell; repeatable."),
]
Benchmarks = Annotated[Path | None, typer.Option(metavar="DIR", help="Other benchmarks than those of this LEMA.")]
