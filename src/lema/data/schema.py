"""What the fields of a row mean: five kinds of rows, detected or stated, as conversations, completions or text.

It knows fields, roles and what may be wrong with them; it knows nothing of tokenizers or where rows come from.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .rows import Rows

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
_FIELDS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_LOOKED_AT = 16


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages; those before `learned_from` are context whoever says them."""

    messages: list[Message]
    learned_from: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it, both text."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Instruction(Completion):
    """A completion whose prompt does not end in what separates it from the answer."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text learned from its first token to its last."""

    text: str


Content = Conversation | Completion | PlainText


def detect_format(rows: Rows) -> str:
    """The kind of rows, from the fields of the first readable ones.

    Raises:
        InputError: none of the first rows has the fields of a kind; says what they have.
    """
    seen: dict[str, Any] = {}
    broken: InputError | None = None
    for index in range(min(_LOOKED_AT, len(rows))):
        try:
            row = rows[index]
        except InputError as error:
            broken = broken or error
            continue
        filled = {name for name, value in row.items() if value is not None}
        for kind, fields in _FIELDS.items():
            if filled.issuperset(fields):
                return kind
        seen |= dict.fromkeys(row)
    if not seen and broken is not None:
        raise broken
    needed = "; ".join(f"{kind}: {' and '.join(fields)}" for kind, fields in _FIELDS.items())
    raise InputError(
        f"{rows.name}: the rows have {_names(seen)}, which is no known kind of row ({needed}); rename the fields"
    )


def read_row(row: Mapping[str, Any], kind: str) -> Content:
    """What a row of a kind says.

    Raises:
        InputError: a field is missing, empty, of the wrong type, or a role is unknown; does not say which row.
    """
    return _READERS[kind](row)


def _messages_row(row: Mapping[str, Any]) -> Content:
    messages = _messages(_field(row, "messages"), "messages")
    return Conversation(_with_answer(messages, "messages"), tools=_tools(row))


def _conversations_row(row: Mapping[str, Any]) -> Content:
    turns = _list(_field(row, "conversations"), "conversations")
    messages: list[Any] = []
    if isinstance(system := row.get("system"), str) and system.strip():
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, Mapping) and "from" in turn:
            speaker = turn["from"]
            if not isinstance(speaker, str) or speaker not in _SHAREGPT:
                raise InputError(f"conversations, turn {number} is from {speaker!r}{_choose(speaker, _SHAREGPT)}")
            if "value" not in turn:
                raise InputError(f"conversations, turn {number} has no value; it has {_names(turn)}")
            turn = {"role": _SHAREGPT[speaker], "content": turn["value"]}
        messages.append(turn)
    return Conversation(_with_answer(_messages(messages, "conversations"), "conversations"), tools=_tools(row))


def _prompt_completion_row(row: Mapping[str, Any]) -> Content:
    prompt, completion = _field(row, "prompt"), _field(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(_text(prompt, "prompt", may_be_empty=True), _text(completion, "completion"))
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, list):
            raise InputError(f"{name} is {_kind(value)}, neither text nor a list of messages")
    before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
    return Conversation(before + _with_answer(after, "completion"), learned_from=len(before), tools=_tools(row))


def _instruction_row(row: Mapping[str, Any]) -> Content:
    prompt = _text(_field(row, "instruction"), "instruction")
    given = row.get("input")
    if given is not None and _text(given, "input", may_be_empty=True).strip():
        prompt = f"{prompt}\n\n{given}"
    output = _text(_field(row, "output"), "output")
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        turns = [("system", system), ("user", prompt), ("assistant", output)]
        return Conversation([{"role": role, "content": content} for role, content in turns])
    return Instruction(prompt, output)


def _text_row(row: Mapping[str, Any]) -> Content:
    return PlainText(_text(_field(row, "text"), "text"))


_READERS: dict[str, Callable[[Mapping[str, Any]], Content]] = {
    "messages": _messages_row,
    "conversations": _conversations_row,
    "prompt_completion": _prompt_completion_row,
    "instruction": _instruction_row,
    "text": _text_row,
}


def _messages(value: Any, name: str) -> list[Message]:
    """Messages with known roles and text in them; fields that are null are left out."""
    messages = []
    for number, message in enumerate(_list(value, name), 1):
        place = f"{name}, message {number}"
        if not isinstance(message, Mapping):
            raise InputError(f"{place} is {_kind(message)}, not an object with role and content")
        message = {key: item for key, item in message.items() if item is not None}
        if "role" not in message:
            raise InputError(f"{place} has no role; it has {_names(message)}")
        role = message["role"]
        if role not in ROLES:
            raise InputError(f"{place} has the role {role!r}{_choose(role, ROLES)}")
        if "content" in message:
            _text(message["content"], f"{place} (role {role}): content", may_be_empty=bool(message.get("tool_calls")))
        elif not message.get("tool_calls"):
            raise InputError(f"{place} (role {role}) has no content; it has {_names(message)}")
        messages.append(message)
    return messages


def _with_answer(messages: list[Message], name: str) -> list[Message]:
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{name} has no assistant turn, so there is nothing to learn from it")
    return messages


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row: a list of schemas, or one written as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"tools is not JSON: {error}") from error
    if not tools:
        return None
    return _list(tools, "tools")


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        close = difflib.get_close_matches(name, [str(key) for key in row], n=1)
        raise InputError(f"the field {name!r} is missing; it has {_names(row)}" + (f" ({close[0]}?)" if close else ""))
    if row[name] is None:
        raise InputError(f"{name} is null")
    return row[name]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{name} is {_kind(value)}, not a list")
    if not value:
        raise InputError(f"{name} is empty")
    return list(value)


def _text(value: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        parts = "; only text is learned, so join its parts to one string" if isinstance(value, list) else ""
        raise InputError(f"{name} is {_kind(value)}, not text{parts}")
    if not may_be_empty and not value.strip():
        raise InputError(f"{name} is empty")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{name} has half a surrogate pair at character {error.start + 1}, no text") from error
    return value


def _choose(value: Any, known: Sequence[str] | Mapping[str, str]) -> str:
    close = difflib.get_close_matches(str(value).lower(), list(known), n=1)
    return f"; known: {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _names(fields: Mapping[Any, Any]) -> str:
    return ", ".join(str(name) for name in list(fields)[:12]) or "no fields"


def _kind(value: Any) -> str:
    names = {"str": "text", "dict": "an object", "list": "a list", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, f"{type(value).__name__}")
