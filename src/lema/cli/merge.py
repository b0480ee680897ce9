"""`lema merge`: an adapter merged into its base, as a model that any library loads.

It knows options and what is said meanwhile; merging is the export room's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LemaError
from .options import Checkpoint, dtype_of
from .settings import usage_of

if TYPE_CHECKING:
    from ..export.merge import MergeResult
    from ..export.shards import Shard


def merge(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The directory to make.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The base model: directory, .safetensors file or hub id. Default: as the checkpoint says.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, float16 or bfloat16. Default: as the base is stored.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT", help="nf4, int8 or fp8: the merged model in codes again. Default: in 16 or 32 bits."
        ),
    ] = None,
    single_file: Annotated[bool, typer.Option("--single-file", help="One model.safetensors.")] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Cut anew into files of at most this, as in 5GB. Default: the base's cut."),
    ] = None,
    upload: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Send each file to this repository of the hub as it is made, and remove it here."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --upload: replace weights the repository has already.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="Compare the merged model's logits with those of base and adapter; streams both. Not with --upload."
        ),
    ] = True,
) -> None:
    """Merge an adapter into its base, file by file, in the memory of about one layer.

    Stopped, it goes on where it was when called again. OUTPUT appears when everything is done.

    Example: lema merge runs/mine/final merged --max-shard-size 2GB
    """
    from ..export.merge import merge as run
    from ..machine.memory import parse_bytes
    from ..prepare.quantise import encoder_of

    if overwrite and upload is None:
        raise typer.BadParameter("is about a repository: give --upload too", param_hint="--overwrite")
    if single_file and max_shard_size is not None:
        raise typer.BadParameter("contradicts --single-file: give one of them", param_hint="--max-shard-size")
    with usage_of("--max-shard-size"):
        size = None if max_shard_size is None else parse_bytes(max_shard_size, "max_shard_size")
    if quantize is not None and upload is not None:
        raise typer.BadParameter("contradicts --upload: upload the folder afterwards", param_hint="--quantize")
    with usage_of("--quantize"):
        if quantize is not None:
            encoder_of(quantize)
    target = dtype_of(dtype)
    try:
        result = run(
            checkpoint, output, base=base, dtype=target, quantize=quantize, single_file=single_file,
            max_shard_size=size, upload=upload, overwrite=overwrite, verify=verify, progress=_tell,
        )  # fmt: skip
    except (KeyboardInterrupt, LemaError, OSError):
        kept = output.absolute().with_name(f".{output.absolute().name}.partial")
        if any(kept.glob("*.safetensors")):
            typer.echo(f"Finished files are kept in {kept}; the same command goes on from there.", err=True)
        raise
    show(result)


def _tell(shard: Shard, number: int, total: int, state: str) -> None:
    from ..machine.memory import format_bytes

    typer.echo(f"{number}/{total}  {shard.name}  {format_bytes(shard.data_bytes)}  {state}")


def show(result: MergeResult) -> None:
    """What was made, and how far it is from base and adapter."""
    from ..machine.memory import format_bytes

    found = result.comparison
    _warn(result)
    if result.repo is not None:
        typer.echo(f"{format_bytes(result.nbytes)} are at {result.repo}, each file confirmed by its sha256.")
        typer.echo(
            f"{result.output} has the rest and a list of them. Logits were not compared: the files are not here."
        )
        return
    typer.echo(f"{result.output}: {format_bytes(result.nbytes)}, {result.changed} tensors changed{_share(result)}.")
    _tell_errors(result.errors)
    if found is None:
        typer.echo("Not verified.")
    else:
        before = ", before that," if result.errors else ""
        typer.echo(
            f"Verified{before} on {found.tokens} tokens: logits are off base and adapter by {found.error:.1e} of their "
            f"norm ({found.allowed:.0e} would be rounding; the adapter itself changes them by {found.effect:.1e}), "
            f"the most likely token is the same at {found.same_choice:.0%}."
        )


def _tell_errors(errors: dict[str, float]) -> None:
    if errors:
        worst, mean = max(errors, key=errors.__getitem__), sum(errors.values()) / len(errors)
        typer.echo(
            f"{len(errors)} tensors are codes again: off the merged ones by {mean:.2%} of their norm on average, by "
            f"{errors[worst]:.2%} at most ({worst})."
        )


def _warn(result: MergeResult) -> None:
    """Loudly, where the type written leaves little of the adapter."""
    found = result.comparison
    if result.moved is not None and (result.moved < 0.5 or (found is not None and not found.arrives)):
        kept = "" if found is None else f" {found.kept:.0%} of its effect on the logits is left."
        typer.echo(
            f"warning: the type written rounds the adapter away: only {result.moved:.1%} of the elements it changes "
            f"differ from the base's.{kept} Use --dtype float32, or keep the adapter apart.",
            err=True,
        )


def _share(result: MergeResult) -> str:
    return "" if result.moved is None else f", {result.moved:.1%} of their elements"
