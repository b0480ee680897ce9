"""Conversations as token ids, with labels on what the assistant says.

It knows messages, a tokenizer and its chat template; it knows nothing of models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

_IGNORE = -100


@dataclass(frozen=True, slots=True)
class ChatExample:
    """Token ids of a conversation, and a label for each: its id where the assistant speaks, else -100."""

    input_ids: list[int]
    labels: list[int]


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a JSONL file; blank lines are passed over. A bad row is an `InputError` that names its line."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} holds {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]], max_length: int | None = None) -> ChatExample:
    """A conversation as ids and labels.

    Everything the template writes from the start of an assistant's turn to its end is a target, the end
    token too, whether or not it is also the padding token.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: dicts with `role` and `content`.
        max_length: tokens at most; a longer conversation is an error, never cut in silence.

    Raises:
        InputError: no assistant turn, a template that rewrites earlier turns, or too many tokens.
    """
    text = ""
    spans: list[tuple[int, int]] = []
    for end, message in enumerate(messages, 1):
        if message.get("role") != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[: end - 1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages[:end], tokenize=False)
        if not text.startswith(prompt):
            raise InputError(f"the chat template writes turn {end} differently when it is answered: {prompt[-80:]!r}")
        spans.append((len(prompt), len(text)))
    if not spans:
        raise InputError("the conversation has no assistant turn, so there is nothing to learn from it")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    if max_length is not None and len(ids) > max_length:
        raise InputError(f"the conversation has {len(ids)} tokens, more than max_length={max_length}")
    labels = [
        token if any(begin <= start and start < stop for begin, stop in spans) else _IGNORE
        for token, (start, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ChatExample(ids, labels)


def collate(examples: Sequence[ChatExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch padded on the right: `input_ids`, `attention_mask` and `labels`, each `[batch, seq]`."""
    width = max(len(example.input_ids) for example in examples)
    padding = [width - len(example.input_ids) for example in examples]
    return {
        "input_ids": torch.tensor([e.input_ids + [pad_token_id] * n for e, n in zip(examples, padding, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(e.input_ids) + [0] * n for e, n in zip(examples, padding, strict=True)]
        ),
        "labels": torch.tensor([e.labels + [_IGNORE] * n for e, n in zip(examples, padding, strict=True)]),
    }
