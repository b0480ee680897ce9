"""`lema data`: its verbs; `check` says what a data file holds, how it is read, and which rows are bad.

It knows options and which files are meant; rows are read, encoded and counted by the data room.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.config import DataConfig
from ..errors import ConfigError
from .extensions import Extensible
from .options import Json
from .paths import expands_paths
from .settings import split_settings

if TYPE_CHECKING:
    from ..data.dataset import TokenDataset
    from ..data.limits import ModelLimits
    from ..data.survey import Survey

_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Checked:
    """One file, looked at."""

    name: str
    kind: str
    dataset: TokenDataset
    survey: Survey
    max_dropped: float

    @property
    def dropped_share(self) -> float:
        """Of the rows looked at."""
        return self.survey.dropped.total() / self.survey.rows

    @property
    def good(self) -> bool:
        """Whether a run would take it."""
        return self.survey.bad == 0 and self.survey.kept > 0 and self.dropped_share <= self.max_dropped


data = typer.Typer(cls=Extensible, help="Data files.", no_args_is_help=True)


@data.callback()
def _data() -> None:
    """Data files.

    Example: lema data check run.yaml
    """


@data.command()
@expands_paths
def check(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="A data file (JSONL, JSON, CSV, Parquet), a datasets directory, or the YAML file of a run.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose tokenizer counts. Needed unless FILE is a YAML file.")
    ] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens of a row. Default: the YAML's, or 512.")] = None,
    data_format: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="How rows are read. Default: as the first ones say.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at this many rows, spread over the file.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of the data; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count rows and tokens, show what is learned of one, and name bad rows; status 1 if a run would not take it.

    Example: lema data check chat.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --max-seq-length 1024
    """  # fmt: skip
    given = split_settings(settings or ())
    for name, value in (("max_seq_length", max_seq_length), ("data_format", data_format)):
        if value is not None:
            given[name] = str(value)
    config, tokenizer_of, length, limits = _settings(file, model, given)
    checked = look(config, tokenizer_of, length, limit, quiet=as_json, limits=limits)
    if as_json:
        typer.echo(json.dumps([as_dict(one) for one in checked], indent=2))
    else:
        from .data_table import show

        for one in checked:
            show(one)
    if not all(one.good for one in checked):
        raise typer.Exit(1)


def look(
    config: DataConfig, model: str, max_seq_length: int, limit: int | None, quiet: bool = True,
    limits: ModelLimits | None = None,
) -> list[Checked]:  # fmt: skip
    """Look at the training file, and at the evaluation file if there is one.

    Args:
        limits: what the model can take; None: nothing is known of it but its tokenizer.

    Raises:
        LemaError: a file cannot be read at all, or model or template have no use.
    """
    from ..data.limits import ModelLimits
    from ..data.load import dataset_of, held_out_rows, rows_of
    from ..data.render import ChatRenderer
    from ..data.survey import survey
    from ..run.training import load_tokenizer

    tokenizer = load_tokenizer(model)
    renderer = ChatRenderer.from_file(tokenizer, config.chat_template, config.chat_template_kwargs)
    found = []
    for path in (config.train_file, config.eval_file):
        if path is None:
            continue
        rows, kind = rows_of(path, config)
        if path == config.train_file:
            held_out_rows(config.eval_size, len(rows))
        dataset = dataset_of(rows, kind, renderer, config, max_seq_length, limits or ModelLimits())
        chosen = _spread(len(rows), limit)
        indices = chosen if quiet or len(chosen) < 2000 else _with_progress(chosen, path)
        found.append(Checked(path, kind, dataset, survey(dataset, indices), config.max_dropped))
    return found


def as_dict(one: Checked) -> dict[str, Any]:
    """JSON-ready: counts in rows, lengths in tokens, shares from 0 to 1."""
    return {
        "file": one.name, "format": one.kind, "rows_in_file": len(one.dataset), "good": one.good,
        "max_seq_length": one.dataset.max_seq_length, "fingerprint": one.dataset.rows.fingerprint,
        **one.survey.as_dict(),
    }  # fmt: skip


def _settings(file: str, model: str | None, given: dict[str, str]) -> tuple[DataConfig, str, int, ModelLimits | None]:
    """Settings of the data, the model, the length and what the model takes: of a run's file, whose other settings are
    held against it as `lema train` does, or of the command line alone."""
    from ..run.planned import adapter_of, check_adapters
    from ..run.training import check_run, limits_of
    from ..storage.gguf_header import is_gguf
    from ..training.run_config import RunConfig, parse_overrides

    if Path(file).suffix.lower() in _YAML:
        run = RunConfig.from_yaml(file, {**given, **({"model_name_or_path": model} if model is not None else {})})
        if run.data.train_file is None:
            raise ConfigError(f"{file} names no train_file")
        adapter = adapter_of(run.lema)
        lm = adapter.causal_lm()
        taken = limits_of(lm)
        check_run(run, lm, bool(run.data.eval_file or run.data.eval_size))
        check_adapters(run.lema, adapter)
        return run.data, run.lema.model_name_or_path, run.lema.max_seq_length, taken
    if model is None:
        raise typer.BadParameter(
            "is needed to count tokens, unless FILE is the YAML file of a run", param_hint="--model"
        )

    run = RunConfig.from_dict({**parse_overrides(given), "train_file": file, "model_name_or_path": model})
    folder = Path(model).parent if Path(model).suffix == ".safetensors" else Path(model)
    described = (folder / "config.json").is_file() or is_gguf(folder)
    limits = limits_of(adapter_of(run.lema).causal_lm()) if described else None
    length = run.lema.max_seq_length
    if limits is not None:
        if "max_seq_length" not in given:  # the default is no wish
            length = min(length, limits.positions or length)
        limits.check_length(length)
    return run.data, model, length, limits


def _spread(rows: int, limit: int | None) -> list[int] | range:
    """Numbers of rows, evenly over all."""
    if limit is None or limit >= rows:
        return range(rows)
    return [i * rows // limit for i in range(limit)]


def _with_progress(indices: Iterable[int], name: str) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return track(indices, description=name, console=Console(stderr=True), transient=True)
