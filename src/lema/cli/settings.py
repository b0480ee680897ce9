"""Settings as a command line writes them, `name=value`, as what `LemaConfig` takes.

It knows the types of the settings; which values are good is for the config to say.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import typer

from ..config import LemaConfig
from ..errors import ConfigError

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Values by name. Unknown names are kept, for `LemaConfig.from_dict` to refuse.

    Raises:
        typer.BadParameter: not of the form `name=value`, or a name twice.
        ConfigError: a value that cannot be of the setting's type.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        name = name.replace("-", "_")
        if not equals or not name:
            raise typer.BadParameter(f"{pair!r} is not name=value", param_hint="--set")
        if name in found:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--set")
        found[name] = parse_value(name, text)
    return found


def parse_value(name: str, text: str) -> Any:
    """The value of one setting: "none", numbers, yes and no, names with commas between them where several may be."""
    hint = typing.get_type_hints(LemaConfig).get(name, str)
    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds:
        if text.lower() not in _BOOLS:
            raise ConfigError(f"{name}={text!r} must be true or false")
        return _BOOLS[text.lower()]
    if int in kinds and text.removeprefix("-").isdecimal():
        return int(text)
    if float in kinds:
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"{name}={text!r} must be a number") from None
    if list[str] in kinds and "," in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text
