"""`DataConfig`: which rows a run learns from, and how they become batches. Checked when it is made.

It knows names, defaults and bounds; it knows nothing of torch, tokenizers or files' contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import AfterValidator

from ..errors import ConfigError
from ..paths import MaybePath
from ..typed import OBJECT, REAL, SAME_NUMBERS, Amount, NotNegative, one_of, settings

FORMATS = ("auto", "messages", "conversations", "prompt_completion", "instruction", "text")
TOO_LONG = ("truncate", "drop", "error")
ON_BAD_ROW = ("error", "skip")
RESERVED_VARIABLES = frozenset((
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "conversation",
    "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens",
))  # fmt: skip


def _columns(columns: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if columns is None:
        return None
    if not all(ours and (theirs is None or (isinstance(theirs, str) and theirs)) for ours, theirs in columns.items()):
        raise ValueError("must give names of fields, as {prompt: question}")
    taken = [theirs for theirs in columns.values() if theirs is not None]
    if twice := next((name for name in taken if taken.count(name) > 1), None):
        raise ConfigError(f"columns takes two fields from {twice!r}: each is one")
    return columns


def _variables(variables: dict[str, Any] | None) -> dict[str, Any] | None:
    if taken := RESERVED_VARIABLES.intersection(variables or ()):
        raise ConfigError(f"chat_template_kwargs: {', '.join(sorted(taken))} is what LEMA itself gives to the template")
    return variables


def _rows_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be whole rows (1 or more) or a share below 1")
    return value


@settings
class DataConfig:
    """Settings of the data. Bad values raise `ConfigError` at construction."""

    train_file: Annotated[MaybePath, SAME_NUMBERS] = None
    """JSONL, JSON, CSV or Parquet file (.gz and .zst too), a pattern of such files, a `save_to_disk` directory, a data
    set of the hub (`owner/name:split`), or - for standard input."""
    eval_file: Annotated[MaybePath, SAME_NUMBERS] = None
    """Rows to evaluate on, in any of the same forms."""
    eval_size: Annotated[NotNegative, AfterValidator(_rows_or_share)] = 0
    """Rows held out of train_file for evaluation: a number of rows (1 or more), or a share of them (below 1)."""
    data_format: Annotated[str, one_of(*FORMATS)] = "auto"
    """Fields of a row: messages, conversations, prompt_completion, instruction or text; auto: as the first rows say."""
    columns: Annotated[dict[str, Any] | None, AfterValidator(_columns), OBJECT] = None
    """Fields under other names, as {prompt: question, completion: answer}; null: a field of that name is not read."""
    on_bad_row: Annotated[str, one_of(*ON_BAD_ROW)] = "error"
    """What happens to a row that cannot be used: error, or skip (counted, and at most max_dropped of the rows)."""
    chat_template: Annotated[MaybePath, SAME_NUMBERS] = None
    """A file with a Jinja chat template, or the name of one of the tokenizer's; None: the tokenizer's own."""
    chat_template_kwargs: Annotated[dict[str, Any] | None, AfterValidator(_variables), OBJECT] = None
    """Variables of the chat template, as {enable_thinking: false}; kept with the tokenizer, for chat and others."""
    train_on_prompt: bool = False
    """True: learn the prompts too, not only what the assistant says."""
    mask_history: bool = False
    """True: learn only the last answer of each conversation."""
    too_long: Annotated[str, one_of(*TOO_LONG)] = "truncate"
    """What happens to a row of more than max_seq_length tokens: truncate (cut its end), drop, or error."""
    max_dropped: Annotated[float, Ge(0), Le(1), REAL, SAME_NUMBERS] = 0.1
    """Share of rows that may be dropped: too long, without a target left, or bad and skipped; more stops the run."""
    packing: bool = False
    """True: lay several rows one after the other up to max_seq_length, without attention between them."""
    group_by_length: bool = False
    """True: rows of about the same length, in bytes, go into the same step: less padding."""
    shuffle: bool = True
    """False: rows in the order of the file, in every epoch."""
    data_seed: Amount | None = None
    """Of order and held-out rows; None: the run's seed."""

    def __post_init__(self) -> None:
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
