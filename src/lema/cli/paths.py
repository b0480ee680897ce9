"""Paths on the command line, expanded before a verb sees them: `--model=~/x` is none that a shell expands.

It knows which parameters of a verb are paths: those of that type, and those whose metavar says so.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo, OptionInfo

from ..errors import ConfigError
from ..paths import expanded

_SAY_PATH = {"CHECKPOINT", "DATA", "DIR", "FILE", "MODEL", "OUTPUT", "PATH", "RUN", "SOURCE", "SPEC"}


def expands_paths(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with `~` and variables expanded in the paths it is given; `typer.BadParameter` where they cannot be."""
    paths = {name: said for name, hint in _hints(verb).items() if (said := _said(name, hint)) is not None}

    @functools.wraps(verb)
    def with_paths(*args: Any, **values: Any) -> None:
        for name, said in paths.items():
            value = values.get(name)
            if isinstance(value, list):
                values[name] = [_expanded(said, part) for part in value]
            elif value is not None:
                values[name] = _expanded(said, value)
        verb(*args, **values)

    return with_paths


def _hints(verb: Callable[..., None]) -> dict[str, Any]:
    return typing.get_type_hints(verb, include_extras=True)


def _said(name: str, hint: Any) -> str | None:
    """How a parameter that is a path is called on the command line; None for others."""
    kind, *more = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    info = next((part for part in more if isinstance(part, (ArgumentInfo, OptionInfo))), None)
    words = re.findall(r"[A-Z]+", (info.metavar if info is not None else None) or "")
    if Path not in (kind, *typing.get_args(kind)) and _SAY_PATH.isdisjoint(words):
        return None
    if isinstance(info, ArgumentInfo):
        return info.metavar or name.upper()
    given = info.param_decls if info is not None else ()
    return next((text for text in given or () if text.startswith("--")), f"--{name.replace('_', '-')}")


def _expanded(said: str, value: str | Path) -> str | Path:
    try:
        text = expanded(said, str(value))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    return value if text == str(value) else type(value)(text)
