"""`DataConfig`: which rows a run learns from, and how they become batches. Checked when it is made.

It knows names, defaults and bounds; it knows nothing of torch, tokenizers or files' contents.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..paths import expanded

FORMATS = ("auto", "messages", "conversations", "prompt_completion", "instruction", "text")
TOO_LONG = ("truncate", "drop", "error")
ON_BAD_ROW = ("error", "skip")
RESERVED_VARIABLES = frozenset((
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "conversation",
    "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens",
))  # fmt: skip

PATHS = ("train_file", "eval_file", "chat_template")


@dataclass
class DataConfig:
    """Settings of the data. Bad values raise `ConfigError` at construction."""

    train_file: str | None = None
    """JSONL, JSON, CSV or Parquet file (.gz and .zst too), a pattern of such files, a `save_to_disk` directory, a data
    set of the hub (`owner/name:split`), or - for standard input."""
    eval_file: str | None = None
    """Rows to evaluate on, in any of the same forms."""
    eval_size: float = 0
    """Rows held out of train_file for evaluation: a number of rows (1 or more), or a share of them (below 1)."""
    data_format: str = "auto"
    """Fields of a row: messages, conversations, prompt_completion, instruction or text; auto: as the first rows say."""
    columns: dict[str, Any] | None = None
    """Fields under other names, as {prompt: question, completion: answer}; null: a field of that name is not read."""
    on_bad_row: str = "error"
    """What happens to a row that cannot be used: error, or skip (counted, and at most max_dropped of the rows)."""
    chat_template: str | None = None
    """A file with a Jinja chat template, or the name of one of the tokenizer's; None: the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, as {enable_thinking: false}; kept with the tokenizer, for chat and others."""
    train_on_prompt: bool = False
    """True: learn the prompts too, not only what the assistant says."""
    mask_history: bool = False
    """True: learn only the last answer of each conversation."""
    too_long: str = "truncate"
    """What happens to a row of more than max_seq_length tokens: truncate (cut its end), drop, or error."""
    max_dropped: float = 0.1
    """Share of rows that may be dropped: too long, without a target left, or bad and skipped; more stops the run."""
    packing: bool = False
    """True: lay several rows one after the other up to max_seq_length, without attention between them."""
    group_by_length: bool = False
    """True: rows of about the same length, in bytes, go into the same step: less padding."""
    shuffle: bool = True
    """False: rows in the order of the file, in every epoch."""
    data_seed: int | None = None
    """Of order and held-out rows; None: the run's seed."""

    def __post_init__(self) -> None:
        for name in PATHS:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
                raise ConfigError(f"{name}={value!r} must be a path")
            setattr(self, name, expanded(name, os.fspath(value)))
        variables = self.chat_template_kwargs
        if variables is not None:
            if not isinstance(variables, dict) or not all(isinstance(name, str) for name in variables):
                raise ConfigError(
                    f"chat_template_kwargs={variables!r} must be names with values: {{enable_thinking: false}}"
                )
            if taken := RESERVED_VARIABLES.intersection(variables):
                raise ConfigError(
                    f"chat_template_kwargs: {', '.join(sorted(taken))} is what LEMA itself gives to the template"
                )
        for name, values in (("data_format", FORMATS), ("too_long", TOO_LONG), ("on_bad_row", ON_BAD_ROW)):
            if getattr(self, name) not in values:
                raise ConfigError(self._one_of(name, values))
        for name in ("train_on_prompt", "mask_history", "packing", "group_by_length", "shuffle"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false")
        self._check_columns()
        self._check_numbers()
        if self.train_file == self.eval_file == "-":
            raise ConfigError("train_file and eval_file are both -: standard input can be read once")
        if self.eval_file is not None and self.eval_size:
            raise ConfigError("eval_file and eval_size are both given: take rows from one place")
        if self.packing and self.group_by_length:
            raise ConfigError("packing and group_by_length are both on: packing leaves no padding to save")
        if self.group_by_length and not self.shuffle:
            raise ConfigError("group_by_length orders rows by itself, and shuffle is off: choose one")
        if self.train_on_prompt and self.mask_history:
            raise ConfigError("train_on_prompt learns every turn and mask_history only the last answer: choose one")

    def _check_columns(self) -> None:
        columns = self.columns
        if columns is None:
            return
        if not isinstance(columns, Mapping) or not all(
            isinstance(ours, str) and ours and (theirs is None or (isinstance(theirs, str) and theirs))
            for ours, theirs in columns.items()
        ):
            raise ConfigError(f"columns={columns!r} must give names of fields, as {{prompt: question}}")
        taken = [theirs for theirs in columns.values() if theirs is not None]
        if twice := next((name for name in taken if taken.count(name) > 1), None):
            raise ConfigError(f"columns takes two fields from {twice!r}: each is one")
        self.columns = dict(columns)

    def _check_numbers(self) -> None:
        for name in ("eval_size", "max_dropped"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ConfigError(f"{name}={value!r} must be a number, 0 or more")
        if self.eval_size >= 1 and self.eval_size != int(self.eval_size):
            raise ConfigError(f"eval_size={self.eval_size!r} must be whole rows (1 or more) or a share below 1")
        if self.max_dropped > 1:
            raise ConfigError(f"max_dropped={self.max_dropped!r} is a share of the rows: 1 or less")
        seed = self.data_seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ConfigError(f"data_seed={seed!r} must be a whole number, 0 or more")

    def _one_of(self, name: str, values: Sequence[str]) -> str:
        close = difflib.get_close_matches(str(getattr(self, name)), values, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(values)}{hint}"
