"""JSON that is one object, such as settings in a file: read whole, or refused with what is wrong with it.

It knows files and JSON; it knows nothing of what the objects mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError, LemaError

_MAX_BYTES = 1 << 26


def read_object(path: Path, refused: type[LemaError] = CheckpointError) -> dict[str, Any]:
    """The object in a file.

    Args:
        refused: the error to raise.

    Raises:
        LemaError: of that type: not a regular file, not UTF-8, not JSON, nested too deeply, or no object.
    """
    if not path.is_file():
        raise refused(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size > _MAX_BYTES:
        raise refused(f"{path} has {path.stat().st_size} bytes, too many for a file of settings")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise refused(f"{path} is not valid JSON: {error}") from error
    return parse_object(text, str(path), refused)


def parse_object(text: str, where: str, refused: type[LemaError] = CheckpointError) -> dict[str, Any]:
    """The object that a text is; `where` names the text in messages. Raises as `read_object` does."""
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise refused(f"{where} is nested too deeply to be read") from error
    except ValueError as error:  # JSONDecodeError is one, and so is a number that is too long
        raise refused(f"{where} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise refused(f"{where} holds {type(values).__name__}, not an object")
    return values
