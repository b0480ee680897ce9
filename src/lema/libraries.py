"""Optional libraries and packages and how to get them, and what this one is called where packages come from.

Bounds are the same as those of the extras in pyproject.toml, which a test holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

DISTRIBUTION = "lema-lora"
"""The name to install under; the package that is imported, and the command, are `lema`. On PyPI `lema` is somebody
else's project."""
_COMMAND = "lema.cli.app:main"
REPLY, KAGGLE = "lema-lora-reply", "lema-lora-kaggle"
VERBS = {"data build": REPLY, "data validate": REPLY, "demo": REPLY, "kaggle": KAGGLE}
"""Verbs that packages of their own bring, and which."""
FORMATS = {"lema-reply": REPLY}
"""Formats of replies, likewise."""
BOUNDS = {
    "datasets": ">=3",
    "gguf": ">=0.10",
    "matplotlib": ">=3.8",
    "tensorboard": ">=2.16",
    "trackio": ">=0.20",
    "wandb": ">=0.18",
}
"""Of the libraries that messages speak of."""


def how_to_install(*names: str, bounds: Mapping[str, str] = BOUNDS) -> str:
    """The command that installs these libraries, in versions that will do: `pip install 'gguf>=0.10'`."""
    return " ".join(["pip install", *(f"'{name}{bounds[name]}'" for name in names)])


def how_to_add(name: str) -> str:
    """What to say where one of this project's other packages is missing; they lie in its checkout."""
    needed = {KAGGLE: (REPLY, KAGGLE)}.get(name, (name,))
    folders = " ".join(f"packages/{part.replace('-lora', '')}" for part in needed)
    return f"{name} is not installed. Run, in a checkout of LEMA: pip install {folders}"


def distribution() -> metadata.Distribution:
    """This package's own metadata, also that of a checkout installed before it had its name.

    Raises:
        PackageNotFoundError: it is on the path without being installed.
    """
    for name in (DISTRIBUTION, "lema"):
        for found in metadata.distributions(name=name):
            if any(entry.value == _COMMAND for entry in found.entry_points):
                return found
    raise metadata.PackageNotFoundError(DISTRIBUTION)
