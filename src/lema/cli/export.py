"""`lema export`: a checkpoint in another form.

It knows options; the forms are the export room's.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .options import Checkpoint, dtype_of


class Form(str, Enum):
    """What to make."""

    PEFT = "peft"
    HF = "hf"
    GGUF = "gguf-adapter"


def export(
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", help="The directory to make; a .gguf file for gguf-adapter.", show_default=False
        ),
    ],
    to: Annotated[
        Form,
        typer.Option(
            help="peft: a clean adapter for PEFT and servers. hf: the merged model, as `lema merge` makes it. "
            "gguf-adapter: one file for llama.cpp's --lora."
        ),
    ] = Form.PEFT,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The base model; for peft also the name it is given. Default: as the checkpoint says."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Of what is written. Default: as it is stored; float32 for gguf-adapter."),
    ] = None,
) -> None:
    """Write a checkpoint as a PEFT adapter, a merged model or a GGUF adapter.

    Example: lema export runs/mine/final adapter --to peft --base HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from ..export.check import check_adapter, refuse_problems

    target = dtype_of(dtype)
    if to is not Form.PEFT:
        refuse_problems(checkpoint)
    if to is Form.HF:
        from ..export.merge import merge
        from .merge import show

        show(merge(checkpoint, output, base=base, dtype=target))
        return
    if to is Form.GGUF:
        from ..export.gguf_adapter import export_gguf

        typer.echo(str(export_gguf(checkpoint, output, base=base, dtype=dtype or "float32")))
        return
    from ..export.peft_adapter import export_peft
    from .adapter import show_findings

    made = export_peft(checkpoint, output, base=base, dtype=target)
    typer.echo(str(made))
    show_findings([finding for finding in check_adapter(made) if finding.level != "ok"])
