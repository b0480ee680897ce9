"""Settings as a command line writes them, `name=value`, as what the configurations take.

It knows the form; types are the configurations' own, and which values are good is for them to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from ..config import LemaConfig
from ..typed import kinds_of, parse_text


def split_settings(pairs: Sequence[str]) -> dict[str, str]:
    """Texts by name; `-` in a name is `_`.

    Raises:
        typer.BadParameter: not of the form `name=value`, or a name twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        name = name.replace("-", "_")
        if not equals or not name:
            raise typer.BadParameter(f"{pair!r} is not name=value", param_hint="--set")
        if name in found:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--set")
        found[name] = text
    return found


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Values of `LemaConfig` by name. Unknown names are kept, for `LemaConfig.from_dict` to refuse.

    Raises:
        typer.BadParameter: not of the form `name=value`, or a name twice.
        ConfigError: a value that cannot be of the setting's type.
    """
    return {name: parse_value(name, text) for name, text in split_settings(pairs).items()}


def parse_value(name: str, text: str) -> Any:
    """The value of one setting: "none", numbers, yes and no, names with commas between them where several may be."""
    return parse_text(name, text, kinds_of(LemaConfig).get(name, (str,)))
