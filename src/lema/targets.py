"""Which modules get LoRA: names, commas, regular expressions, brought to the two forms that PEFT takes.

It knows texts; which modules there are, and whether one matches, PEFT says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .errors import ConfigError
from .typed import shortened, split_names

ALL_LINEAR = "all-linear"
_OF_PATTERNS = re.compile(r"[\\*+?^$|()\[\]{}]")


def as_targets(name: str, given: str | Sequence[str]) -> list[str] | str:
    """A list of names, which PEFT compares with the ends of modules' paths, or one pattern for whole paths.

    Names beside patterns become part of the expression.

    Args:
        name: of the setting, for messages.

    Raises:
        ConfigError: something that is no text, or a pattern that is not one.
    """
    listed = [given] if isinstance(given, str) else sorted(given) if isinstance(given, (set, frozenset)) else given
    if not isinstance(listed, (list, tuple)) or not all(isinstance(part, str) for part in listed):
        raise ConfigError(f"{name}={shortened(given)} must be a list of texts or text")
    parts = [part for text in listed for part in split_names(text)]
    if parts == [ALL_LINEAR]:
        return ALL_LINEAR
    if ALL_LINEAR in parts:
        raise ConfigError(f"{name}: {ALL_LINEAR} means every linear module of the layers, so nothing stands beside it")
    if not any(map(_is_pattern, parts)):
        return parts
    for part in parts:
        if _is_pattern(part) and not _compiles(part):
            if len(listed) == 1 and _compiles(listed[0]):
                return listed[0]  # a bracket that stands for itself
            raise ConfigError(f"{name}: {part!r} is not a regular expression: {_problem(part)}")
    if len(parts) == 1:
        return parts[0]
    return "|".join(f"(?:{part})" if _is_pattern(part) else rf"(?:(?:.*\.)?{re.escape(part)})" for part in parts)


def _is_pattern(text: str) -> bool:
    return _OF_PATTERNS.search(text) is not None


def _compiles(text: str) -> bool:
    return _problem(text) is None


def _problem(text: str) -> str | None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None
