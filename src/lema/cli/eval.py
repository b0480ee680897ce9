"""`lema eval`: how well a checkpoint predicts held-out data, beside the model it began from.

Options and the table are here; sums are the training room's, batches the data room's. Replies in a format are judged
by the package that brings the format.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .chat_options import Base, Template, Variables, Where, open_chat_model
from .options import Settings

if TYPE_CHECKING:
    from ..chat import ChatModel
    from ..data.config import DataConfig
    from ..data.stream import BatchStream
    from ..training.run_config import RunConfig

STDOUT = "-"
_LOSS_CHUNK = 256
_ROWS = (("eval_loss", "loss", ".4f"), ("eval_perplexity", "perplexity", ".3f"),
         ("eval_token_accuracy", "token accuracy", ".2%"), ("seconds", "seconds", ".1f"))  # fmt: skip


def evaluate(
    checkpoint: Where,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows to evaluate on. Default: what the run held out, or its eval_file."),
    ] = None,
    data_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Of FILE; default: the run's, or detected. lema-reply, with the package lema-lora-reply: let the "
            "models answer, and judge the replies.",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows at once; 4, or 16 answers.", show_default=False)] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens a row; default: the run's.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Leave the base model out.")] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON too; - prints it and nothing else.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions at most; lema-reply only.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; lema-reply only, 128.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the shares; lema-reply only.")] = None,
    base: Base = None,
    chat_template: Template = None,
    chat_template_kwargs: Variables = None,
    settings: Settings = None,
) -> None:
    """Loss, perplexity and token accuracy of CHECKPOINT and of its base model, on the same rows.

    With --format lema-reply: replies in the format, and right answers, to the questions of a file of `lema data build`.

    Example: lema eval output/final --data held_out.jsonl
    """
    from ..chat.formats import format_named, known_formats

    run = _run_of(Path(checkpoint))
    if data_format in known_formats():
        means_nothing = {
            "--max-seq-length": max_seq_length, "--chat-template": chat_template,
            "--chat-template-kwargs": chat_template_kwargs,
        }  # fmt: skip
        _refuse(means_nothing, f"--format {data_format}")
        format_named(str(data_format)).evaluate(
            lambda: open_chat_model(checkpoint, base, False, None, settings), data or _held_out(run),
            checkpoint=checkpoint, alone=alone, limit=limit,
            max_new_tokens=128 if max_new_tokens is None else max_new_tokens,
            batch_size=16 if batch_size is None else batch_size, as_json=as_json, plot_file=plot,
        )  # fmt: skip
        return
    reply_only = {"--limit": limit, "--max-new-tokens": max_new_tokens, "--plot": plot}
    _refuse(reply_only, f"no --format {' or '.join(known_formats())}")
    chosen = _data_config(run, data, data_format)
    batch_size = 4 if batch_size is None else batch_size
    asked = [f"batch_size={batch_size}", *(settings or ())]
    if not any(pair.partition("=")[0].strip() == "loss_chunk_size" for pair in asked):
        asked.append(f"loss_chunk_size={_LOSS_CHUNK}")
    with open_chat_model(checkpoint, base, False, chat_template, asked, chat_template_kwargs) as chat_model:
        length = max_seq_length or chat_model.model.config.max_seq_length
        rows = _rows(chosen, chat_model, length, batch_size, run)
        results = _results(chat_model, rows, alone)
    text = json.dumps(results, indent=2)
    if as_json == STDOUT:
        typer.echo(text)
        return
    if as_json is not None:
        Path(as_json).write_text(text + "\n", encoding="utf-8")
    _show(results)


def _refuse(given: dict[str, Any], beside: str) -> None:
    """Usage errors for options that mean nothing in the other kind of evaluation."""
    for option, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"means nothing with {beside}", param_hint=option)


def _held_out(run: RunConfig | None) -> Path:
    """The file of held-out rows that a run was given."""
    if run is None or run.data.eval_file is None:
        raise ConfigError("nothing says which questions to ask: give --data FILE, rows of `lema data build --held-out`")
    return Path(run.data.eval_file)


def _run_of(checkpoint: Path) -> RunConfig | None:
    """The configuration stored with the run that a checkpoint is of."""
    from ..training.run_config import RUN_FILE, RunConfig

    found = next((path for path in (checkpoint / RUN_FILE, checkpoint.parent / RUN_FILE) if path.is_file()), None)
    return RunConfig.from_yaml(found) if found is not None else None


def _data_config(run: RunConfig | None, file: Path | None, data_format: str | None) -> DataConfig:
    import dataclasses

    from ..data.config import DataConfig

    chosen = run.data if run is not None else DataConfig()
    if file is not None:
        kind = data_format or (chosen.data_format if run is not None else "auto")
        chosen = dataclasses.replace(chosen, eval_file=str(file), eval_size=0, data_format=kind)
    elif run is None or (chosen.eval_file is None and not chosen.eval_size):
        raise ConfigError("nothing says what to evaluate on: give --data FILE (the run held out no rows)")
    # rows are taken one after the other, each for itself; template and variables are in the checkpoint's tokenizer
    return dataclasses.replace(
        chosen, packing=False, group_by_length=False, shuffle=False, chat_template=None, chat_template_kwargs=None
    )


def _rows(
    chosen: DataConfig, chat_model: ChatModel, length: int, batch_size: int, run: RunConfig | None
) -> BatchStream:
    import dataclasses

    from ..data import load_data

    if chosen.eval_file is not None:  # the data trained on need not be there any more
        chosen = dataclasses.replace(chosen, train_file=chosen.eval_file, eval_size=0)
    seed = run.lema.seed if run is not None else chat_model.model.config.seed
    loaded = load_data(chosen, chat_model.tokenizer, max_seq_length=length, rows_per_step=batch_size, seed=seed)
    assert loaded.eval is not None
    return loaded.eval


def _results(chat_model: ChatModel, rows: BatchStream, alone: bool) -> dict[str, dict[str, Any]]:
    from ..training.evaluation import evaluate

    trainer = chat_model.model.get_trainer()
    adapted = chat_model.model.lora_manager is not None
    arms = (
        [("model", False)] if not adapted else [("adapter", False)] if alone else [("base", True), ("adapter", False)]
    )
    results = {}
    for name, bare in arms:
        model: Any = chat_model.model.hf_model
        with model.disable_adapter() if bare else nullcontext():
            results[name] = evaluate(trainer, rows)
    return results


def _show(results: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for key, label, form in _ROWS:
        table.add_row(label, *(format(values[key], form) for values in results.values()))
    targets = next(iter(results.values()))["eval_targets"]
    table.add_row("targets", *(f"{targets:,}" for _ in results))
    Console().print(table)
