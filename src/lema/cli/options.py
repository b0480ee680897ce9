"""Options and arguments that several verbs have, and how their texts become values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .settings import usage_of

if TYPE_CHECKING:
    import torch

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="A checkpoint of a run, or any PEFT adapter's directory.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting of LemaConfig; repeatable.")
]


def dtype_of(text: str | None) -> torch.dtype | None:
    """What `--dtype` says; `typer.BadParameter` for no type of weights."""
    from ..prepare.single_file import parse_dtype

    with usage_of("--dtype"):
        return None if text is None else parse_dtype(text)
