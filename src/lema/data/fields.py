"""Which fields of a row are read, which are refused because they change what a row means, and which are not used.

It knows the names that fields of data files have, of other tools too; it knows nothing of values, but that some say
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InputError
from .checks import is_absent, printable
from .messages import LEARNED_MARKS, MASKED_MARKS, is_unclear_mark
from .thinking import FIELDS as REASONING
from .tools import CALL_FIELDS

NEEDED = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Fields without which a row is none of its kind."""
_MORE = {
    "messages": ("system", "tools", "functions"),
    "conversations": ("system", "tools", "functions"),
    "prompt_completion": ("system", "history", "tools", "functions"),
    "instruction": ("input", "system", "history", "tools", "functions"),
    "text": (),
}
_MARKS = (*LEARNED_MARKS, *MASKED_MARKS)
PREFERENCES = (
    "chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages", "preferred_output",
    "non_preferred_output", "kto_tag", "chosen_rating", "rejected_rating", "margin",
)  # fmt: skip
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_OTHER = {
    "chat_template_kwargs": "variables of the template are the same for all rows",
    "completions": "a row teaches one completion: make a row of each",
}
_IN_CONVERSATIONS = {"history": "a conversation has its earlier turns as messages: put them there"}
_IN_MESSAGES = ("role", "content", "tool_calls")
_PARTS = ("type", "text")


def refuse_others(row: Mapping[str, Any], kind: str) -> None:
    """Refuse fields of a row that would make it mean something else than what is learned from it.

    Raises:
        InputError: names the field, and what to do.
    """
    reasons = dict.fromkeys(PREFERENCES, "answers that are preferred to others are not trained here")
    reasons |= dict.fromkeys(_MEDIA, "only text is learned")
    reasons |= _OTHER
    if kind in ("messages", "conversations"):
        reasons |= _IN_CONVERSATIONS
    marks = {} if kind == "text" else dict.fromkeys(("label", "labels"), "whether an answer is wanted is not trained")
    for name in row:
        if name not in ("label", "labels") and is_unclear_mark(name, row[name] if kind != "text" else None):
            marks[name] = "what it says of what is learned is not followed here"
    for name, reason in (reasons | marks).items():
        if name not in (*NEEDED[kind], *_MORE[kind]) and not is_absent(row.get(name)):
            raise InputError(
                f"the row has {name}, and {reason}; take the field out, or say that it is not to be read: "
                f"columns: {{{name}: null}}"
            )


def unused_fields(row: Mapping[str, Any], kind: str, mentions: Callable[[str], bool]) -> list[str]:
    """Names of what a row says and nothing reads: fields of the row, of its messages and of its calls.

    Args:
        mentions: whether the chat template reads a field of messages; templates read more than roles and content.
    """
    known = (*NEEDED[kind], *_MORE[kind], *_MARKS)
    found = {printable(name): None for name, value in row.items() if name not in known and not is_absent(value)}
    if kind == "text":
        return list(found)
    for name in ("tools", "functions"):
        if not is_absent(row.get(name)) and not mentions("tools"):
            found[name] = None
    lists = [name for name in NEEDED[kind] if isinstance(row.get(name), (list, tuple))]
    for name in lists:
        for message in row[name]:
            if isinstance(message, Mapping):
                found |= dict.fromkeys(f"{name}.{field}" for field in _unused_in(message, mentions))
    return list(found)


def _unused_in(message: Mapping[str, Any], mentions: Callable[[str], bool]) -> list[str]:
    """Fields of a message that neither this room nor the template reads."""
    read = [*_IN_MESSAGES, *_MARKS, "function_call", *(("from", "value") if "from" in message else ())]
    if any(name in message for name in REASONING) and any(map(mentions, REASONING)):
        read += REASONING
    found = [
        printable(name)
        for name, value in message.items()
        if name not in read and not is_absent(value) and not mentions(printable(name))
    ]
    for part in message["content"] if isinstance(message.get("content"), list) else ():
        if isinstance(part, Mapping):
            found += [f"content.{printable(name)}" for name in part if name not in _PARTS]
    for call in message["tool_calls"] if isinstance(message.get("tool_calls"), list) else ():
        if isinstance(call, Mapping):
            found += [f"tool_calls.{printable(name)}" for name in call if name not in CALL_FIELDS]
    return found
