"""Messages of a row: roles, content, calls of tools, and marks that say which turns are not to be learned.

It knows the forms that chat data has (OpenAI's, ShareGPT's, axolotl's, torchtune's, ms-swift's); it knows nothing of
templates or of what else is in a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .checks import choose, kind_of, list_of, names, printable, text_of
from .tools import calls_of, read_calls

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_OLD_ROLES = {"function": "tool"}
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "observation": "tool", "function_call": "assistant",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")

LEARNED_MARKS = ("weight", "train", "trainable", "training", "loss")
"""Fields that are true or 1 where something is learned, else false or 0: OpenAI's, axolotl's, ms-swift's."""
MASKED_MARKS = ("masked",)
"""Fields that are true where something is not learned: torchtune's."""
UNCLEAR_MARKS = (
    "mask", "loss_mask", "loss_scale", "loss_weight", "train_detail", "training_detail", "train_mask", "label",
    "labels",
)  # fmt: skip
"""Fields that change what is learned in ways that cannot be followed here."""
_OF_LEARNING = re.compile(r"[\w-]*(train|learn|loss|mask|weight|supervis)[\w-]*", re.IGNORECASE)


def is_unclear_mark(name: Any, value: Any) -> bool:
    """Whether a field seems to change what is learned: one of those, or a number, yes or no under such a name."""
    if name in UNCLEAR_MARKS or name in LEARNED_MARKS or name in MASKED_MARKS:
        return name in UNCLEAR_MARKS
    return isinstance(value, (bool, int, float)) and _OF_LEARNING.fullmatch(str(name)) is not None


@dataclass(frozen=True, slots=True)
class Messages:
    """Messages, and which of them are marked not to be learned."""

    messages: list[Message]
    """Each with `role` and, unless it calls tools, `content`; no marks are left in them."""
    unlearned: frozenset[int] = frozenset()
    """Numbers of the assistant's messages that are not learned, from 0."""


def read_messages(value: Any, name: str) -> Messages:
    """Messages with known roles and text in them; fields that are null are left out.

    Raises:
        InputError: says which message is wrong, and what with it.
    """
    found: list[Message] = []
    unlearned: set[int] = set()
    for number, message in enumerate(list_of(value, name), 1):
        place = f"{name}, message {number}"
        if not isinstance(message, Mapping):
            raise InputError(f"{place} is {kind_of(message)}, not an object with role and content")
        message = {key: item for key, item in message.items() if item is not None}
        if "role" not in message:
            raise InputError(f"{place} has no role; it has {names(message)}")
        role = message["role"]
        message["role"] = role = _OLD_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise InputError(f"{place} has the role {role!r}{choose(role, ROLES)}")
        place = f"{place} (role {role})"
        learned = take_mark(message, place)
        if role == "assistant" and learned is False:
            unlearned.add(number - 1)
        elif role != "assistant" and learned:
            raise InputError(
                f"{place} is marked to be learned, and of conversations the assistant's turns are: take the mark away, "
                "or set train_on_prompt: true and mark nothing"
            )
        _read_content(message, place)
        found.append(message)
    return Messages(found, frozenset(unlearned))


def _read_content(message: Message, place: str) -> None:
    """Put content and calls of a message into their one form."""
    calls = calls_of(message, place)
    message.pop("function_call", None)
    if calls:
        message["tool_calls"] = calls
    if "content" in message:
        content = message["content"]
        if message["role"] == "tool" and _is_result(content):
            content = json.dumps(content, ensure_ascii=False)
        elif isinstance(content, (list, tuple)):
            content = _joined(content, f"{place}: content")
        may_be_empty = bool(calls) or message["role"] == "tool"
        message["content"] = text_of(content, f"{place}: content", may_be_empty=may_be_empty)
    elif not calls:
        raise InputError(f"{place} has no content; it has {names(message)}")


def _is_result(content: Any) -> bool:
    """Whether what a tool answers is an object, or a list that is none of parts of content."""
    if isinstance(content, Mapping):
        return True
    return isinstance(content, list) and not any(
        isinstance(part, str) or (isinstance(part, Mapping) and ("type" in part or "text" in part)) for part in content
    )


def _joined(parts: list[Any] | tuple[Any, ...], name: str) -> str:
    """The text of a list of parts; what is no text is refused by its type."""
    texts = []
    for number, part in enumerate(parts, 1):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise InputError(f"{name}, part {number} is {kind_of(part)}, not an object with type and text")
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS:
            raise InputError(f"{name}, part {number} is of the type {kind!r}, and only text is learned: take it out")
        texts.append(text_of(part.get("text"), f"{name}, part {number}: text", may_be_empty=True))
    return "".join(texts)


def of_sharegpt(turns: Any) -> list[Any]:
    """Turns with `from` and `value` as messages; those that have roles already stay as they are."""
    messages: list[Any] = []
    for number, turn in enumerate(list_of(turns, "conversations"), 1):
        if isinstance(turn, Mapping) and turn.get("from") is not None:
            speaker, place = turn["from"], f"conversations, turn {number}"
            if not isinstance(speaker, str) or speaker not in SHAREGPT:
                raise InputError(f"{place} is from {speaker!r}{choose(speaker, SHAREGPT)}")
            if "value" not in turn:
                raise InputError(f"{place} has no value; it has {names(turn)}")
            rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
            role, value = SHAREGPT[speaker], turn["value"]
            if speaker == "function_call":
                turn = {**rest, "role": role, "content": "", "tool_calls": read_calls(value, f"{place}: value")}
            else:
                turn = {**rest, "role": role, "content": value}
        messages.append(turn)
    return messages


def take_mark(holder: dict[str, Any], place: str) -> bool | None:
    """Take the marks out of a message or row: whether it is to be learned; None where no mark says.

    Raises:
        InputError: a mark is neither yes nor no, marks contradict each other, or one is of another kind.
    """
    where = f"{place} has"
    for name, value in holder.items():
        if value is not None and is_unclear_mark(name, value):
            raise InputError(
                f"{where} {printable(name)}, which says what is learned in a way that is not followed here: mark turns "
                "that are not to be learned with train: false"
            )
    said: dict[str, bool] = {}
    for name in (*LEARNED_MARKS, *MASKED_MARKS):
        value = holder.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise InputError(f"{where} {name}: {value!r}, and only 0 and 1, or false and true, are followed")
        said[name] = bool(value) != (name in MASKED_MARKS)
    if len(set(said.values())) > 1:
        raise InputError(f"{where} {' and '.join(said)}, which contradict each other")
    return next(iter(said.values()), None)
