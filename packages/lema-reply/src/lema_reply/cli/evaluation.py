"""`lema eval --format lema-reply`: how many replies keep the format and how many answers are right.

The table, the files written and the progress shown are made here; answers and scores are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lema import __version__
from lema.cli.streams import as_json as written
from lema.errors import ConfigError

if TYPE_CHECKING:
    from lema.chat import ChatModel

    from ..evaluate import Evaluation
    from ..score import Share

STDOUT = "-"


def evaluate_replies(
    open_model: Callable[[], ChatModel],
    data: Path,
    *,
    checkpoint: str,
    alone: bool,
    limit: int | None,
    max_new_tokens: int,
    batch_size: int,
    as_json: str | None,
    plot_file: Path | None,
) -> None:
    """Ask, score and show.

    Args:
        checkpoint: what `open_model` opens, for what is written down.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..arms import arms_of
    from ..evaluate import evaluate, read_questions
    from ..grammar import STOP
    from ..plot import check_plot, plot

    if plot_file is not None:
        check_plot(plot_file)
    for file in (plot_file, None if as_json in (None, STDOUT) else Path(str(as_json))):
        if file is not None and not file.parent.is_dir():  # said now, not after all the answers
            raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}")
    questions = read_questions(data, limit)
    with (
        open_model() as chat_model,
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("answers")
        arms = arms_of(
            chat_model, alone=alone, max_new_tokens=max_new_tokens, batch_size=batch_size,
            tell=lambda count: progress.advance(task, count),
        )  # fmt: skip
        progress.update(task, total=len(arms) * len(questions))
        evaluation = evaluate(questions, arms)
        config = chat_model.model.config
    said: dict[str, Any] = {
        "checkpoint": checkpoint, "base": config.model_name_or_path, "dtype": config.dtype, "device": config.device,
        "data": str(data), "decoding": "greedy", "max_new_tokens": max_new_tokens, "stop": STOP, "lema": __version__,
    }  # fmt: skip
    if as_json == STDOUT:
        typer.echo(written({**said, **evaluation.to_json()}, indent=1))
    else:
        if as_json is not None:
            evaluation.save(as_json, **said)
        _show(evaluation)
    if plot_file is not None:
        plot(evaluation, plot_file, f"{Path(checkpoint).name}: {len(questions)} held-out questions")


def _show(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    scores = evaluation.scores
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for score in scores:
        table.add_column(score.name, justify="right")
    table.add_row("exactly in the format", *(_share(s.strict) if s.in_format else "" for s in scores))
    table.add_row("right answers", *(_share(s.right) for s in scores))
    for category in scores[0].by_category:
        table.add_row(f"  {category}", *(_share(s.by_category[category]) for s in scores))
    table.add_row("right anywhere in the reply", *(_share(s.right_anywhere) for s in scores))
    unsettled = sum(not question.settled for question in evaluation.questions)
    if unsettled:
        table.add_row("cannot be settled", *("" for _ in scores))
        table.add_row("  in the format", *(_share(s.unsettled_strict) if s.in_format else "" for s in scores))
        table.add_row("  says Low", *(_share(s.unsettled_low) if s.in_format else "" for s in scores))
    console = Console()
    console.print(table)
    console.print(
        f"{len(evaluation.questions)} questions, {unsettled} of them not to be settled and left out of right answers; "
        "in brackets Wilson's 95% interval",
        style="dim", markup=False, highlight=False,
    )  # fmt: skip


def _share(share: Share) -> str:
    if not share.of:
        return "none"
    low, high = share.interval
    return f"{share.value:.1%} ({low:.0%}-{high:.0%})"
