"""Checks of the values in a row, and the words in which messages say what is wrong with them.

It knows types and text; it knows no field by its name. Nothing here says which row it is: who read the row does.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import InputError


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field that must be there."""
    if name not in row:
        close = difflib.get_close_matches(name, [str(key) for key in row], n=1)
        hint = f" ({printable(close[0])}?)" if close else ""
        raise InputError(f"the field {name!r} is missing; it has {names(row)}{hint}")
    if row[name] is None:
        raise InputError(f"{name} is null")
    return row[name]


def list_of(value: Any, name: str) -> list[Any]:
    """The value, if it is a list with something in it."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{name} is {kind_of(value)}, not a list")
    if not value:
        raise InputError(f"{name} is empty")
    return list(value)


def text_of(value: Any, name: str, may_be_empty: bool = False) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise InputError(f"{name} is {kind_of(value)}, not text")
    if not may_be_empty and not value.strip():
        raise InputError(f"{name} is empty")
    return value


def json_of(text: str, name: str) -> Any:
    """What is written as JSON in a text, with no half surrogate pair anywhere in it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is text that is not JSON: {str(error).partition(';')[0]}") from error
    check_whole_characters(value, name)
    return value


def check_numbers(value: Any, name: str) -> None:
    """Refuse NaN and infinities anywhere inside a value, which JSON has no words for."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise InputError(f"{name} has {one}, a number that JSON has no word for")
        if isinstance(one, Mapping):
            pending.extend(one.values())
        elif isinstance(one, (list, tuple)):
            pending.extend(one)


def check_whole_characters(value: Any, name: str = "") -> None:
    """Refuse half a surrogate pair, which no encoding of text can hold, in any text inside a value, names included.

    Raises:
        InputError: says in which, as `messages, item 2, content`.
    """
    pending = [value]
    while pending:  # no recursion: JSON may be nested deeper than Python's stack
        one = pending.pop()
        if isinstance(one, str):
            if not one.isascii() and _half_at(one) is not None:
                break
        elif isinstance(one, Mapping):
            pending.extend(one)
            pending.extend(one.values())
        elif isinstance(one, (list, tuple)):
            pending.extend(one)
    else:
        return
    for place, text in _texts(value, name):
        if (at := _half_at(text)) is not None:
            raise InputError(f"{place} has half a surrogate pair at character {at + 1}, no text")


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every text inside a value, with its place."""
    pending: list[tuple[str, Any]] = [(name, value)]
    while pending:
        place, one = pending.pop()
        start = f"{place}, " if place else ""
        if isinstance(one, str):
            yield place, one
        elif isinstance(one, Mapping):
            for key, item in one.items():
                if isinstance(key, str):
                    yield f"{start}the name {printable(key)!r}", key
                pending.append((f"{start}{printable(key)}", item))
        elif isinstance(one, (list, tuple)):
            pending.extend((f"{start}item {number}", item) for number, item in enumerate(one, 1))


def _half_at(text: str) -> int | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def printable(value: Any) -> str:
    """A name as a message can show it whatever is in it."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def choose(value: Any, known: Sequence[str] | Mapping[str, str]) -> str:
    """The end of a message about a value that is none of those known."""
    close = difflib.get_close_matches(str(value).lower(), list(known), n=1)
    return f"; known: {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


def names(fields: Mapping[Any, Any]) -> str:
    """The first fields by name."""
    return ", ".join(printable(name) for name in list(fields)[:12]) or "no fields"


def kind_of(value: Any) -> str:
    """What a value is, as a user would say."""
    words = {"str": "text", "dict": "an object", "list": "a list", "NoneType": "null", "bool": "true or false"}
    return words.get(type(value).__name__, type(value).__name__)


def is_absent(value: Any) -> bool:
    """Whether a field says nothing: null, empty text, an empty list or object; false and 0 say something."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and len(value) == 0)
