"""`check_files`: whether every line of data files is an example as it should be, and which are not.

Checked are fields, grammar and template; whether an answer is true is not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lema.data.index import check_regular
from lema.errors import InputError

from .grammar import CONFIDENCES, SYSTEM, read
from .rows import CATEGORIES, FIELDS, question_key

TEMPLATE = Path(__file__).parent / "recipes" / "lema_reply.jinja"
_ROLES = ["system", "user", "assistant"]
_KINDS: dict[str, type] = {"messages": list, "accepted": list}


@dataclass(frozen=True)
class Fault:
    """A line, and what is wrong with it."""

    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.what}"


@dataclass
class Checked:
    """Files, looked at."""

    rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Good rows by category and confidence."""


def check_files(paths: Sequence[Path]) -> Checked:
    """Check every line of files; a question must not come twice in any of them.

    Raises:
        InputError: a file does not exist or cannot be read.
    """
    checked = Checked()
    asked: dict[str, Fault] = {}
    for path in paths:
        before_it = checked.rows
        for line, raw in _lines(path):
            checked.rows += 1
            row, faults = _row_of(raw)
            if not faults:
                faults = _faults(row)
            if not faults:
                here = Fault(path, line, "")
                before = asked.setdefault(question_key(row["question"]), here)
                if before is not here:
                    where = f"line {before.line}" + (f" of {before.file}" if before.file != path else "")
                    faults = [f"the question is that of {where}, but for case and punctuation"]
            checked.faults += [Fault(path, line, what) for what in faults]
            if not faults:
                checked.counts[row["category"], row["confidence"]] += 1
        if checked.rows == before_it:
            checked.faults.append(Fault(path, 1, "there are no rows"))
    return checked


def render(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
    """Messages as the shipped chat template writes them."""
    return _template().render(messages=messages, add_generation_prompt=add_generation_prompt)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    # As transformers sets it up.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        check_regular(path)
        with open(path, "rb") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _row_of(raw: bytes) -> tuple[dict[str, Any], list[str]]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, [f"is not UTF-8 at byte {error.start + 1}"]
    except (ValueError, RecursionError) as error:
        return {}, ["is empty" if not raw.strip() else f"is not JSON: {error}"]
    return (row, []) if isinstance(row, dict) else ({}, [f"is {type(row).__name__}, not an object"])


def _faults(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row: first of its fields, and only of good ones what they say."""
    return _faults_of_fields(row) or _faults_of_messages(row) or _faults_of_content(row)


def _faults_of_fields(row: Mapping[str, Any]) -> list[str]:
    faults = [f"{name} is missing" for name in FIELDS if name not in row]
    faults += [f"{name!r} is no field of a row" for name in row if name not in FIELDS]
    for name in FIELDS:
        if name not in row:
            continue
        kind = _KINDS.get(name, str)
        if not isinstance(row[name], kind):
            faults.append(f"{name} is {type(row[name]).__name__}, not {kind.__name__}")
        elif kind is str:
            faults += [f"{name} {fault}" for fault in _faults_of_text(row[name])]
    return faults


def _faults_of_text(text: str) -> list[str]:
    if not text.strip():
        return ["is empty"]
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return ["has half a surrogate pair, no text"]
    return []


def _faults_of_messages(row: Mapping[str, Any]) -> list[str]:
    messages = row["messages"]
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles != _ROLES:
        return [f"messages are of {roles!r:.80}, not {_ROLES}"]
    bad = [m["role"] for m in messages if set(m) != {"role", "content"} or not isinstance(m["content"], str)]
    faults = [f"the message of {role} must have role and content, a text" for role in bad]
    if any(not isinstance(one, str) or _faults_of_text(one) for one in row["accepted"]):
        faults.append("accepted has something else than texts")
    return faults


def _faults_of_content(row: Mapping[str, Any]) -> list[str]:
    system, user, assistant = (message["content"] for message in row["messages"])
    reading = read(assistant)
    faults = [f"the reply: {fault}" for fault in reading.faults]
    if system != SYSTEM:
        faults.append(f"the system message is {system!r:.60}, not {SYSTEM!r}")
    if user != row["question"]:
        faults.append("question is not the user's message")
    if reading.strict and reading.reply is not None:
        if reading.reply.text() != assistant:
            faults.append("the reply has whitespace around it")
        for name in ("answer", "confidence"):
            if (said := getattr(reading.reply, name)) != row[name]:
                faults.append(f"{name} {row[name]!r:.60} is not the reply's, {said!r:.60}")
    if row["confidence"] not in CONFIDENCES:
        faults.append(f"confidence is {row['confidence']!r:.60}, none of {', '.join(CONFIDENCES)}")
    if row["category"] not in CATEGORIES:
        faults.append(f"category is {row['category']!r:.60}, none of {', '.join(CATEGORIES)}")
    if render(row["messages"]) != row["text"]:
        faults.append("text is not what the chat template makes of messages")
    return faults
