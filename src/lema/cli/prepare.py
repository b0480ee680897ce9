"""`lema prepare`: any checkpoint made into a folder that streams well.

It knows options and how to show progress; the work is `lema.prepare`'s.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .progress import progress_bar
from .settings import usage_of

if TYPE_CHECKING:
    from ..prepare import Prepared


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A hub id, a directory, or a .safetensors, .bin, .pt or .gguf file.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUTPUT",
            help="The folder to make; not needed where SOURCE streams well as it is.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="float16, bfloat16 or float32. Default: the type of SOURCE; float16 for a quantised GGUF.",
        ),
    ] = None,
    monolithic: Annotated[bool, typer.Option("--monolithic", help="One weights file instead of shards.")] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weights file.")] = "5GB",
    config: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder or hub id with config.json and tokenizer, for weights that have none beside them.",
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which weights file of a directory or repository.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="nf4, int8 or fp8: the layers' matrices, experts among them, as codes. Default: weights as they are.",
            show_default=False,
        ),
    ] = None,
    quantize_also: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="router, embedding or head as well. May be repeated.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Make a folder of safetensors, configuration and tokenizer from SOURCE, in about one tensor's memory.

    Interrupted, the same command goes on where it stopped.

    Example: lema prepare mistral-7b.Q8_0.gguf mistral-7b --dtype bfloat16
    """
    from ..machine.memory import parse_bytes
    from ..prepare import prepare as make
    from ..prepare.quantise import encoder_of, kinds_of
    from ..prepare.single_file import parse_dtype

    with usage_of("--dtype"):
        target = None if dtype is None else parse_dtype(dtype)
    with usage_of("--quantize"):
        if quantize is not None:
            encoder_of(quantize)
    with usage_of("--quantize-also"):
        kinds_of(quantize_also or ())
    with usage_of("--max-shard-size"):
        largest = parse_bytes(max_shard_size, "max_shard_size")
    with progress_bar(not as_json) as progress:
        try:
            prepared = make(
                source,
                output,
                dtype=target,
                monolithic=monolithic,
                max_shard_size=largest,
                config=config,
                file=file,
                revision=revision,
                quantize=quantize,
                quantize_also=quantize_also or (),
                progress=progress,
            )
        except KeyboardInterrupt:
            typer.echo("interrupted: what is written is kept; run the same command again to go on", err=True)
            raise
    if as_json:
        typer.echo(json.dumps(_as_dict(prepared), indent=2))
    else:
        _show(prepared)


def _as_dict(prepared: Prepared) -> dict[str, object]:
    import dataclasses

    return {**dataclasses.asdict(prepared), "path": str(prepared.path)}


def _show(prepared: Prepared) -> None:
    from ..machine.memory import format_bytes

    size = (
        f"{prepared.tensors} tensors, {format_bytes(prepared.nbytes)} of {' and '.join(prepared.dtypes)}, in "
        f"{prepared.files} file{'s' if prepared.files > 1 else ''}"
    )
    if prepared.written:
        same = "as it was made" if prepared.errors else "equal to the source"
        typer.echo(f"{prepared.path}: {size}. Read back from the disk and {same}.")
    else:
        typer.echo(f"{prepared.path}: nothing to do, it streams well as it is: {size}.")
    if prepared.kept:
        typer.echo(f"{prepared.kept} tensors of an interrupted run were verified and kept.")
    if prepared.errors:
        worst = max(prepared.errors, key=prepared.errors.__getitem__)
        mean = sum(prepared.errors.values()) / len(prepared.errors)
        typer.echo(
            f"{len(prepared.errors)} tensors are codes now: off by {mean:.2%} of their norm on average, by "
            f"{prepared.errors[worst]:.2%} at most ({worst}). --json lists all."
        )
    for note in prepared.notes:
        typer.echo(f"note: {note}")
    if prepared.overflowed:
        names = ", ".join(f"{name} ({count})" for name, count in list(prepared.overflowed.items())[:8])
        typer.echo(
            f"warning: {sum(prepared.overflowed.values())} values were too large for the type and are infinite now, in "
            f"{len(prepared.overflowed)} tensors: {names}. Use --dtype bfloat16, which has the range of float32.",
            err=True,
        )
    typer.echo(f"Next:  lema plan {shlex.quote(str(prepared.path))}")
