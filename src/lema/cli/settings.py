"""Settings as a command line writes them, `name=value`, as what the configurations take.

It knows the form; types are the configurations' own, and which values are good is for them to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from ..config import LemaConfig
from ..errors import ConfigError
from ..typed import kinds_of, parse_text


@contextlib.contextmanager
def usage_of(option: str) -> Iterator[None]:
    """A name or value that is refused in the block was given by this option: bad usage, which ends with status 2."""
    try:
        yield
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


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
    """Values of `LemaConfig` by name.

    Raises:
        typer.BadParameter: not of the form `name=value`, a name twice, an unknown one, or a bad value.
    """
    with usage_of("--set"):
        found = {name: parse_value(name, text) for name, text in split_settings(pairs).items()}
        LemaConfig.from_dict({"model_name_or_path": "any", **found})
    return found


def parse_value(name: str, text: str) -> Any:
    """The value of one setting: "none", numbers, yes and no, names with commas between them where several may be."""
    return parse_text(text, kinds_of(LemaConfig).get(name, (str,)))
