"""Paths as people write them: `~`, `~name`, `$NAME` and `${NAME}`, expanded as a shell would.

It knows texts, the environment and which prefixes are there; it knows no setting.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from .errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def _as_path(value: Any, info: ValidationInfo) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        raise ValueError("must be a path, as text" if text else "must be a path, and is empty")
    return expanded(str(info.field_name), text)


PATH = BeforeValidator(_as_path)
PathText = Annotated[str, PATH]
"""Of a setting that is a path, or may be one."""
MaybePath = Annotated[PathText | None, BeforeValidator(lambda value: None if value == "" else value)]
"""Of one that may be left out, which earlier versions wrote as an empty text."""


def expanded(name: str, text: str) -> str:
    """A path with home folders and environment variables put in.

    An absolute path is taken as it stands up to the last folder of it that there is: what was expanded once may be
    expanded again, wherever homes have a `$` in their names. `./~` is a folder of that name, as it is in a shell.

    Args:
        name: of the setting or option, for the message.

    Raises:
        ConfigError: a variable that is not set, or the home of a user whom there is not.
    """
    if not text.startswith("~") and "$" not in text:
        return text
    there, rest = _there(text)
    if rest.startswith("~") and not there:
        home = os.path.expanduser(rest)
        if home == rest:
            raise ConfigError(f"{name}={text!r}: no home is known for {rest.partition('/')[0]}; write the path out")
        rest = home
        if "$" not in text:
            return rest
        there, rest = _there(rest)

    def value(match: re.Match[str]) -> str:
        variable = match[1] or match[2] or ""
        if variable not in os.environ:
            raise ConfigError(
                f"{name}={text!r}: the variable {variable or match[0]} is not set; set it, or write the path out "
                "(./ and an absolute path keep a $ that is part of a name that is there)"
            )
        return os.environ[variable]

    return there + _VARIABLE.sub(value, rest)


def _there(text: str) -> tuple[str, str]:
    """An absolute path, or one that begins with a dot, as the part of it that exists and what comes after."""
    if text.startswith(("/", "./", "../")):
        for end in (len(text), *(match.start() for match in reversed([*re.finditer("/", text)]))):
            if "$" in text[:end] and os.path.lexists(text[:end]):
                return text[:end], text[end:]
    return "", text
