"""Reasoning of a message: in a field of its own, inside its content, or after a prompt that opens it.

It knows messages and tags as text; it knows nothing of templates or tokens.
"""

from __future__ import annotations

import re
from typing import Any

from .messages import Message

FIELDS = ("reasoning_content", "thinking", "reasoning")
_TAGS = "think|thinking|thought|reasoning"
_INSIDE = re.compile(rf"\s*<({_TAGS})>(?P<reason>.*?)</\1>\s*(?P<answer>.*)", re.DOTALL)
_CONTINUED = re.compile(rf"\s*(?:<(?:{_TAGS})>)?(?P<reason>.*?)</(?:{_TAGS})>\s*(?P<answer>.*)", re.DOTALL)
_OPENED = re.compile(r"<([a-zA-Z][\w-]*)>(\s*)\Z")


def reasoning_of(message: Message) -> str | None:
    """What a field of a message says of its reasoning; None: nothing."""
    found: Any = next((message[name] for name in FIELDS if message.get(name) is not None), None)
    return found if isinstance(found, str) and found.strip() else None


def with_field(message: Message) -> Message:
    """The message with reasoning that its content begins with in a field instead."""
    if message.get("role") != "assistant" or reasoning_of(message) is not None:
        return message
    found = _INSIDE.fullmatch(_content(message))
    return message if found is None else {**message, "content": found["answer"], FIELDS[0]: found["reason"].strip("\n")}


def within_content(message: Message, opened: str) -> Message:
    """The message with the reasoning of its field at the begin of its content instead, tagged as a prompt opens it.

    Args:
        opened: what `opening` says, not empty.
    """
    found, reason = _OPENED.search(opened), reasoning_of(message)
    if found is None or reason is None or message.get("role") != "assistant":
        return message
    tag, gap = found[1], found[2]
    rest = {name: value for name, value in message.items() if name not in FIELDS}
    return {**rest, "content": f"<{tag}>{gap}{reason.strip()}{gap}</{tag}>{gap * 2}{_content(message).strip()}"}


def _content(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def opening(prompt: str) -> str:
    """What a prompt ends in that opens reasoning, `<think>` and a line end say; empty: nothing."""
    found = _OPENED.search(prompt)
    return found[0] if found is not None and re.fullmatch(_TAGS, found[1]) else ""


def count_tags(text: str) -> int:
    """Tags of reasoning in a text, opening and closing ones."""
    return len(re.findall(rf"</?(?:{_TAGS})>", text))


def after_opened(prompt: str, written: str, message: Message) -> str | None:
    """The text of a conversation whose prompt opens reasoning that the template leaves out once it is answered.

    Between the two the reasoning is closed as the prompt opened it: `<think>` and a line end by a line end,
    `</think>` and an empty line.

    Args:
        prompt: ends in the opening tag.
        written: the whole conversation as the template writes it.
        message: its last one.

    Returns:
        The prompt, the reasoning (empty where the message has none), and the answer with what follows it; None where
        the prompt opens nothing, or something else is different too.
    """
    opened = _OPENED.search(prompt)
    if opened is None or not opening(prompt) or not written.startswith(prompt[: opened.start()]):
        return None
    tag, gap = opened[1], opened[2]
    reason, answer = reasoning_of(message), _content(message)
    if reason is None and (inside := _CONTINUED.fullmatch(answer)):
        reason, answer = inside["reason"], inside["answer"]
    answer = answer.strip()
    at = written.find(answer, opened.start()) if answer else -1
    if at < 0 or re.fullmatch(rf"(?:\s|</?{tag}>)*", written[opened.start() : at]) is None:
        return None
    return f"{prompt}{(reason or '').strip()}{gap}</{tag}>{gap * 2}{written[at:]}"
