"""What the fields of a row mean: five kinds of rows, detected or stated, as conversations, completions or text.

It knows fields, roles and what may be wrong with them; it knows nothing of tokenizers or where rows come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .checks import check_whole_characters, field_of, is_absent, kind_of, names, text_of
from .fields import NEEDED, PREFERENCES, refuse_others
from .messages import LEARNED_MARKS, MASKED_MARKS, Message, Messages, of_sharegpt, read_messages, take_mark
from .rows import Rows
from .tools import schemas_of

_LOOKED_AT = 16


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages; those before `learned_from` are context whoever says them, and so are those in `unlearned`."""

    messages: list[Message]
    learned_from: int = 0
    tools: list[Any] | None = None
    unlearned: frozenset[int] = frozenset()


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
        for kind, fields in NEEDED.items():
            if filled.issuperset(fields):
                return kind
        seen |= dict.fromkeys(row)
    if not seen and broken is not None:
        raise broken
    if any(name in seen for name in PREFERENCES):
        hint = "; columns: {completion: chosen, rejected: null} learns the chosen ones" if "chosen" in seen else ""
        raise InputError(
            f"{rows.name}: the rows have {names(seen)}: answers of which some are preferred, and preferences are not "
            f"trained here{hint}"
        )
    needed = "; ".join(f"{kind}: {' and '.join(fields)}" for kind, fields in NEEDED.items())
    raise InputError(
        f"{rows.name}: the rows have {names(seen)}, which is no known kind of row ({needed}); rename the fields, or "
        "say which they are, as in columns: {prompt: question, completion: answer}"
    )


def read_row(row: Mapping[str, Any], kind: str) -> tuple[Content, bool]:
    """What a row of a kind says, and whether it is to be learned.

    Raises:
        InputError: a field is missing, empty, of the wrong type or one that changes what the row means, a role is
            unknown, or a text has half a surrogate pair; does not say which row.
    """
    check_whole_characters(row)
    refuse_others(row, kind)
    marks = {name: row[name] for name in (*LEARNED_MARKS, *MASKED_MARKS) if name in row}
    return _READERS[kind](row), take_mark(marks, "the row") is not False


def _messages_row(row: Mapping[str, Any]) -> Content:
    return _conversation(row, read_messages(field_of(row, "messages"), "messages"), "messages")


def _conversations_row(row: Mapping[str, Any]) -> Content:
    turns = of_sharegpt(field_of(row, "conversations"))
    return _conversation(row, read_messages(turns, "conversations"), "conversations")


def _prompt_completion_row(row: Mapping[str, Any]) -> Content:
    prompt, completion = field_of(row, "prompt"), field_of(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        text_of(completion, "completion")
        return _asked(row, prompt, completion) or Completion(prompt, completion)
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, list):
            raise InputError(f"{name} is {kind_of(value)}, neither text nor a list of messages")
    before, after = read_messages(prompt, "prompt"), read_messages(completion, "completion")
    if not is_absent(row.get("history")):
        raise InputError("history goes with a prompt and a completion that are text: put its turns into prompt")
    _with_answer(after.messages, "completion")
    start = len(before.messages)
    both = Messages(before.messages + after.messages, frozenset(number + start for number in after.unlearned))
    return _conversation(row, both, "completion", learned_from=start)


def _instruction_row(row: Mapping[str, Any]) -> Content:
    prompt = text_of(field_of(row, "instruction"), "instruction")
    given = row.get("input")
    if given is not None and text_of(given, "input", may_be_empty=True).strip():
        prompt = f"{prompt}\n\n{given}"
    output = text_of(field_of(row, "output"), "output")
    return _asked(row, prompt, output) or Instruction(prompt, output)


def _asked(row: Mapping[str, Any], prompt: str, answer: str) -> Conversation | None:
    """A question and its answer as a conversation, where the row has more than these: what was said before, or tools.

    The answers of `history`, which is pairs of a question and an answer, are learned as the last one is.
    """
    if all(is_absent(row.get(name)) for name in ("system", "history", "tools", "functions")):
        return None
    turns = []
    for number, pair in enumerate(row.get("history") or (), 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InputError(f"history, item {number} is {kind_of(pair)}, not a pair of a question and an answer")
        for role, content in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text_of(content, f"history, item {number} ({role})")})
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return _conversation(row, Messages(turns), "history")


def _conversation(row: Mapping[str, Any], read: Messages, name: str, learned_from: int = 0) -> Conversation:
    """Messages with the row's system message before them and its tools."""
    messages, unlearned = read.messages, read.unlearned
    _with_answer(messages, name)
    system = row.get("system")
    if not is_absent(system) and text_of(system, "system", may_be_empty=True).strip():
        if messages[0]["role"] in ("system", "developer"):
            if messages[0].get("content") != system:
                raise InputError(f"system is there twice, as a field and as the first of {name}, and differs")
        else:
            messages = [{"role": "system", "content": system}, *messages]
            unlearned, learned_from = frozenset(number + 1 for number in unlearned), learned_from and learned_from + 1
    return Conversation(messages, learned_from, schemas_of(row), unlearned)


def _text_row(row: Mapping[str, Any]) -> Content:
    return PlainText(text_of(field_of(row, "text"), "text"))


_READERS: dict[str, Callable[[Mapping[str, Any]], Content]] = {
    "messages": _messages_row,
    "conversations": _conversations_row,
    "prompt_completion": _prompt_completion_row,
    "instruction": _instruction_row,
    "text": _text_row,
}


def _with_answer(messages: list[Message], name: str) -> list[Message]:
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{name} has no assistant turn, so there is nothing to learn from it")
    return messages
