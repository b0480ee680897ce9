"""`lema data build` and `lema data validate`: the data set of the [LEMA_REPLY] proof, its options and its tables."""

from __future__ import annotations

import shlex
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..build import Built

_SHOWN = 20
_RECIPE = "lema_reply_smollm2_135m.yaml"
_TRAIN_FILE, _HELD_OUT = Path("data/training_data.jsonl"), "held_out.jsonl"


def build(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Rows to train on.")] = _TRAIN_FILE,
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows to evaluate on. Default: held_out.jsonl beside the others."),
    ] = None,
    count: Annotated[int, typer.Option(help="Rows to train on, 5,000 to 10,000.")] = 5_000,
    held_out_count: Annotated[int, typer.Option(help="Rows to evaluate on.")] = 400,
    seed: Annotated[int, typer.Option(help="The same one gives the same bytes.")] = 0,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Allow any number of rows there are questions for.")
    ] = False,
) -> None:
    """Build the data set that teaches the [LEMA_REPLY] format: eight categories, true answers, a held-out file.

    The default one is pinned: it comes with the package, and needs none of those that facts are taken from.

    Example: lema data build -o data/training_data.jsonl --seed 0
    """  # fmt: skip
    from lema.errors import ConfigError

    from ..build import build as make
    from ..build import write
    from ..pinned import DEFAULTS, pinned

    beside = held_out if held_out is not None else out.parent / _HELD_OUT
    if beside.resolve() == out.resolve():
        raise ConfigError(f"{out} is named for both files: give --held-out another name")
    as_pinned = pinned() if (count, seed, held_out_count) == DEFAULTS else None
    built = as_pinned or make(count, seed, held_out_count, any_size)
    write(built, out, beside)
    _show(built)
    typer.echo(f"wrote {len(built.train):,} rows to {out} and {len(built.held_out):,} held out to {beside}")
    check = ["lema", "data", "validate", str(out), str(beside)]
    typer.echo(f"next:\n  {shlex.join(check)}\n  {shlex.join(_training(out, beside))}")


def validate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", show_default=False, help="What `lema data build` writes; several are checked together."
        ),
    ],
) -> None:
    """Check every row of files in the [LEMA_REPLY] format, and name lines and faults; status 1 if there are any.

    Example: lema data validate data/training_data.jsonl data/held_out.jsonl
    """  # fmt: skip
    from ..validate import check_files

    checked = check_files(paths)
    for fault in checked.faults[:_SHOWN]:
        typer.echo(str(fault))
    if (more := len(checked.faults) - _SHOWN) > 0:
        typer.echo(f"and {more:,} more")
    if checked.faults:
        typer.echo(f"{len(checked.faults):,} faults in {checked.rows:,} rows")
        raise typer.Exit(1)
    _show_counts(checked.counts)
    typer.echo(f"all {checked.rows:,} rows are good")


def _training(train_file: Path, eval_file: Path) -> list[str]:
    """The command that trains on the files: the recipe expects them where they are written by default."""
    recipe = Path("recipes", _RECIPE)
    shipped = Path(str(files("lema_reply"))) / recipe
    words = ["lema", "train", str(recipe if recipe.is_file() else shipped)]
    if (train_file, eval_file) != (_TRAIN_FILE, _TRAIN_FILE.with_name(_HELD_OUT)):
        words += ["--set", f"train_file={train_file}", "--set", f"eval_file={eval_file}"]
    return words


def _show(built: Built) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("category")
    for name in ("rows", "facts", "High", "Medium", "Low", "held out", "facts shared"):
        table.add_column(name, justify="right")
    counts = built.counts()
    for one in counts:
        shares = [f"{one.confidence[name] / one.rows:.0%}" if one.rows else "" for name in ("High", "Medium", "Low")]
        shared = f"{one.shared_facts}" if one.shared_facts else "none"
        table.add_row(one.category, f"{one.rows:,}", f"{one.facts:,}", *shares, str(one.held_out), shared)
    every = sum((Counter(one.confidence) for one in counts), Counter())
    table.add_row(
        "all", f"{len(built.train):,}", f"{sum(one.facts for one in counts):,}",
        *(f"{every[name] / len(built.train):.0%}" for name in ("High", "Medium", "Low")),
        f"{len(built.held_out):,}", str(sum(one.shared_facts for one in counts)),
    )  # fmt: skip
    Console().print(table)
    typer.echo("facts shared: held-out questions whose fact training has too, asked in other words")


def _show_counts(counts: Counter[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..grammar import CONFIDENCES
    from ..rows import CATEGORIES

    table = Table(box=None, pad_edge=False)
    table.add_column("category")
    for name in ("rows", *CONFIDENCES):
        table.add_column(name, justify="right")
    for category in CATEGORIES:
        found = [counts[category, name] for name in CONFIDENCES]
        table.add_row(category, f"{sum(found):,}", *(f"{one:,}" for one in found))
    Console().print(table)
