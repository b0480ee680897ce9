"""`load_data`: from settings to the batches of training and evaluation, and a summary of both.

It puts the parts of this room together; it computes nothing itself.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from .config import DataConfig
from .dataset import TokenDataset
from .encode import INSTRUCTION_SEPARATOR, RowEncoder
from .limits import ModelLimits, Within
from .order import split
from .render import ChatRenderer
from .rows import Rows, SomeRows
from .schema import detect_format
from .sources import open_rows
from .stream import BatchStream
from .survey import survey
from .views import MappedRows

logger = logging.getLogger(__name__)

_SAMPLE = 256


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    train: BatchStream
    """Batches of steps, epoch after epoch."""
    eval: BatchStream | None
    """One epoch each time it is iterated over, in the order of the file."""
    summary: dict[str, Any]
    """JSON-ready: files, formats, fingerprints, counts and lengths of a sample."""
    renderer: ChatRenderer
    """The one that chat must use too."""


def load_data(
    config: DataConfig,
    tokenizer: Any,
    *,
    max_seq_length: int,
    rows_per_step: int,
    seed: int,
    train_rows: Any = None,
    eval_rows: Any = None,
    padding_side: str = "right",
    limits: ModelLimits = ModelLimits(),  # noqa: B008
) -> Data:
    """Open, split and check data.

    Args:
        config: its settings.
        tokenizer: the model's, a fast one.
        max_seq_length: tokens of a row, or of a pack.
        rows_per_step: rows, or packs, of a step.
        seed: of the order, unless the settings have one.
        train_rows, eval_rows: rows in Python instead of `train_file` and `eval_file`.
        padding_side: `right` or `left`.
        limits: what the model can take.

    Raises:
        InputError: rows that cannot be learned from, among the first or a sample of all.
        ConfigError: settings that do not fit the data.
    """
    seed = config.data_seed if config.data_seed is not None else seed
    source = train_rows if train_rows is not None else config.train_file
    if source is None:
        raise ConfigError("train_file is missing: give a JSONL, JSON, CSV or Parquet file, or another source of rows")
    if eval_rows is not None and config.eval_size:
        raise ConfigError("eval_size and rows to evaluate on are both given: take them from one place")
    renderer = ChatRenderer.from_file(tokenizer, config.chat_template, config.chat_template_kwargs)
    rows, kind = rows_of(source, config)
    renderer.separator = INSTRUCTION_SEPARATOR if kind == "instruction" and not renderer.has_template else ""
    rows, held_out = _held_out(rows, config, seed)
    eval_source = eval_rows if eval_rows is not None else config.eval_file
    eval_kind = kind
    if eval_source is not None:
        held_out, eval_kind = rows_of(eval_source, config)
    limits.check_length(max_seq_length)
    pad = limits.padding((tokenizer.pad_token_id, tokenizer.eos_token_id))

    def dataset(rows: Rows, kind: str) -> TokenDataset:
        return dataset_of(rows, kind, renderer, config, max_seq_length, limits)

    train = dataset(rows, kind)
    summary: dict[str, Any] = {
        "settings": dataclasses.asdict(config), "max_seq_length": max_seq_length, "rows_per_step": rows_per_step,
        "seed": seed, "train": _described(train, kind), "eval": None,
    }  # fmt: skip
    stream = BatchStream(
        train, rows_per_step, seed, pad_token_id=pad, shuffle=config.shuffle, group_by_length=config.group_by_length,
        packing=config.packing, padding_side=padding_side, max_dropped=config.max_dropped,
    )  # fmt: skip
    summary["train"] |= {"steps_per_epoch": stream.steps_per_epoch, "packs": stream.packs}
    evaluated: BatchStream | None = None
    if held_out is not None:
        evaluation = dataset(held_out, eval_kind)
        evaluated = BatchStream(
            evaluation, rows_per_step, seed, pad_token_id=pad, shuffle=False, padding_side=padding_side,
            max_dropped=config.max_dropped, repeat=False,
        )  # fmt: skip
        summary["eval"] = {**_described(evaluation, eval_kind), "steps_per_epoch": evaluated.steps_per_epoch}
    return Data(stream, evaluated, summary, renderer)


def rows_of(source: Any, config: DataConfig) -> tuple[Rows, str]:
    """The rows of a source under the names that settings give their fields, and their kind."""
    rows = open_rows(source)
    if config.columns:
        rows = MappedRows(rows, config.columns)
    return rows, config.data_format if config.data_format != "auto" else detect_format(rows)


def dataset_of(
    rows: Rows, kind: str, renderer: ChatRenderer, config: DataConfig, max_seq_length: int, limits: ModelLimits
) -> TokenDataset:
    """Rows of a kind, encoded as settings say and as the model can take them."""
    encoder = RowEncoder(
        renderer, kind, train_on_prompt=config.train_on_prompt, mask_history=config.mask_history, limit=max_seq_length
    )
    return TokenDataset(
        rows,
        Within(encoder, limits),
        max_seq_length=max_seq_length,
        too_long=config.too_long,
        on_bad_row=config.on_bad_row,
    )


def check_all_rows(data: Data) -> None:
    """Look at every row of training and evaluation, as the steps will.

    Raises:
        InputError: a bad row, the first, with its place; or more rows would be dropped than `max_dropped` allows.
    """
    for stream in (data.train, data.eval):
        if stream is None:
            continue
        found = survey(stream.dataset, range(len(stream.dataset)))
        if found.bad:
            raise InputError(
                f"{found.bad_rows[0]} ({found.bad} of {found.rows} rows are bad; `lema data check` lists them)"
            )
        stream.check_dropped(found.dropped, found.rows)


def held_out_rows(eval_size: float, rows: int) -> int:
    """How many of so many rows are held out; `ConfigError` where none would be left to train on."""
    if not eval_size:
        return 0
    count = int(eval_size) if eval_size >= 1 else max(1, round(eval_size * rows))
    if count >= rows:
        raise ConfigError(f"eval_size={eval_size:g} holds out {count} of the {rows} rows, and leaves none to train on")
    return count


def _held_out(rows: Rows, config: DataConfig, seed: int) -> tuple[Rows, Rows | None]:
    """Rows to train on, and those kept for evaluation where `eval_size` asks for some."""
    count = held_out_rows(config.eval_size, len(rows))
    if not count:
        return rows, None
    train, held_out = split(len(rows), count, seed)
    return SomeRows(rows, train), SomeRows(rows, held_out)


def _described(dataset: TokenDataset, kind: str) -> dict[str, Any]:
    """What a summary says of rows, from a sample spread over all of them; a bad row in it is raised."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(_SAMPLE, len(dataset))).astype(np.int64))
    found = survey(dataset, indices.tolist())
    if found.bad:
        raise InputError(
            f"{found.bad_rows[0]} ({found.bad} of {found.rows} rows looked at are bad; `lema data check` lists them)"
        )
    if found.whole and not found.ended:
        logger.warning(
            "%s: no answer ends in a special token, so the model may never learn to stop; look at the chat template",
            dataset.rows.name,
        )
    dataset.name_unused(found.unused)
    return {
        "name": dataset.rows.name, "format": kind, "rows": len(dataset), "fingerprint": dataset.rows.fingerprint,
        "sample": found.as_dict(),
    }  # fmt: skip
