"""Fields of settings classes, checked against their types: one place for Python, YAML and the command line.

It knows type hints and how people write numbers; it knows no setting by name and no bounds.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any

from .errors import ConfigError
from .json_file import parse_object

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
LARGEST = 2**63 - 1
"""What generators take as a seed, and files as a count."""
_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of texts",
    dict: "names with values",
}  # fmt: skip


def kinds_of(cls: Any) -> Mapping[str, tuple[Any, ...]]:
    """The alternatives of every field's type hint, by name: `int | None` is `(int, NoneType)`; for a dataclass."""
    return _kinds_of(cls)


@cache
def _kinds_of(cls: Any) -> Mapping[str, tuple[Any, ...]]:
    assert isinstance(cls, type) and dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    return {f.name: _alternatives(hints[f.name]) for f in dataclasses.fields(cls)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def check_types(instance: Any) -> None:
    """Bring the fields of a dataclass to their types where nothing is lost, as 3 to 3.0 and "1e-4" to 0.0001.

    Raises:
        ConfigError: a field holds what its type cannot; says what it takes.
    """
    for name, kinds in kinds_of(type(instance)).items():
        value = getattr(instance, name)
        fitting = as_type(name, value, kinds)
        if fitting is not value:
            setattr(instance, name, fitting)


def as_type(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """The value as the first of these types that holds it; `ConfigError` if none does."""
    if value is None:
        if type(None) in kinds:
            return None
        raise ConfigError(f"{name} must be {_wanted(kinds)}, and is empty")
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, (kind, str)):
            return value  # its owner knows the spellings
    if isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, int) and abs(value) > LARGEST and (int in kinds or float in kinds):
        raise ConfigError(f"{name}={shortened(value)} is too large a number: {_wanted(kinds)} up to 2**63 - 1 is meant")
    elif isinstance(value, int) and int in kinds:
        return value
    elif isinstance(value, (int, float)) and (float in kinds or int in kinds):
        return _number(name, value, kinds)
    elif isinstance(value, str):
        if str in kinds:
            return value
        if any(kind in kinds for kind in (int, float, bool)):
            return _from_text(name, value, kinds)
        if dict[str, Any] in kinds:
            return parse_object(value, f"{name}={shortened(value)}", ConfigError)
    elif isinstance(value, Mapping) and dict[str, Any] in kinds and all(isinstance(key, str) for key in value):
        return dict(value)
    elif isinstance(value, (list, tuple)) and list[str] in kinds and all(isinstance(part, str) for part in value):
        return list(value)
    raise ConfigError(f"{name}={shortened(value)} must be {_wanted(kinds)}")


def parse_text(name: str, text: str, kinds: tuple[Any, ...]) -> Any:
    """What someone typed for a setting: "none", numbers, yes and no, names with commas between where several may be."""
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds or (float in kinds and str not in kinds):
        return _from_text(name, text, kinds)
    if int in kinds and text.removeprefix("-").isdecimal():
        return _whole(name, text)
    if list[str] in kinds:
        parts = split_names(text)
        return parts if len(parts) > 1 or str not in kinds else text
    return text


def split_names(text: str) -> list[str]:
    """Names with commas between them; commas within brackets of any kind belong to a pattern and split nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _whole(name: str, text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise ConfigError(f"{name}={shortened(text)} is too large a number")
    return int(text)


def _from_text(name: str, text: str, kinds: tuple[Any, ...]) -> Any:
    stripped = text.strip()
    if bool in kinds:
        if stripped.lower() in _BOOLS:
            return _BOOLS[stripped.lower()]
    elif int in kinds and stripped.removeprefix("-").isdecimal():
        return _whole(name, stripped)
    else:
        try:
            return _number(name, float(stripped), kinds)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
    raise ConfigError(f"{name}={shortened(text)} must be {_wanted(kinds)}")


def _number(name: str, value: float, kinds: tuple[Any, ...]) -> int | float:
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be a finite number")
    if float in kinds:
        return float(value)
    if value != int(value):
        raise ConfigError(f"{name}={value} must be a whole number")
    if abs(value) > LARGEST:
        raise ConfigError(f"{name}={value} is too large a number")
    return int(value)


def shortened(value: Any) -> str:
    """A value for a message, never a page of it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of more than 4,300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a list with such a number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wanted(kinds: Sequence[Any]) -> str:
    words = [_WORDS.get(typing.get_origin(kind) or kind, "") for kind in kinds if kind is not type(None)]
    found = list(dict.fromkeys(word for word in words if word)) or ["one of its names"]
    return " or ".join(found) + (", or none" if type(None) in kinds else "")
