"""The packages behind `lema kaggle` that not every Python has, and what to say where they are missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lema.errors import KaggleError
from lema.libraries import how_to_install

BOUNDS = {"kaggle": ">=2.2.4", "nbformat": ">=5.10", "requests": ">=2.32"}
"""The same as those that this package declares."""


@contextlib.contextmanager
def kaggle_extra() -> Iterator[None]:
    """Around imports of such packages.

    Raises:
        KaggleError: one is missing; says how to get it and the Python it needs.
    """
    try:
        yield
    except ImportError as error:
        raise KaggleError(
            f"{error.name or error} is not installed. Run: {how_to_install(*BOUNDS, bounds=BOUNDS)} (the "
            "official client needs Python 3.11 or newer)"
        ) from error
