"""Small data at once: a file's rows as a list, and one conversation as token ids.

It knows the parts of this room that do the work; whole data sets go through `load_data` instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .render import ChatRenderer, EncodedRow
from .rows import JsonlRows

ChatExample = EncodedRow


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a JSONL file; blank lines are passed over. A bad row is an `InputError` that names its line."""
    return list(JsonlRows(path))


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]], max_length: int | None = None) -> EncodedRow:
    """A conversation as ids, and labels on what the assistant says.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: dicts with `role` and `content`.
        max_length: tokens at most; a longer conversation is an error, never cut in silence.

    Raises:
        InputError: no assistant turn, a template that rewrites earlier turns, or too many tokens.
    """
    row = ChatRenderer(tokenizer).training(messages)
    if max_length is not None and len(row.input_ids) > max_length:
        raise InputError(f"the conversation has {len(row.input_ids)} tokens, more than max_length={max_length}")
    return row
