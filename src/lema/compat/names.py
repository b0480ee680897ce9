"""The original's names at paths whose rooms lie below what they name now: found when somebody asks for them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {"lema.engine.trainer": {"LemaTrainer": "lema.run.facade"}}


def original(module: str, name: str) -> Any:
    """What a module's `__getattr__` answers: the class of the original's name, where it is now."""
    where = _WHERE[module].get(name)
    if where is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(import_module(where), name)
