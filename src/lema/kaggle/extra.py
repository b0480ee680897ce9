"""The optional packages behind `lema kaggle`, and what to say where they are missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import KaggleError
from ..libraries import how_to_install


@contextlib.contextmanager
def kaggle_extra() -> Iterator[None]:
    """Around imports of packages of the extra.

    Raises:
        KaggleError: one is missing; says how to get it and the Python it needs.
    """
    try:
        yield
    except ImportError as error:
        raise KaggleError(
            f"{error.name or error} is not installed. Run: {how_to_install('kaggle', 'nbformat', 'requests')} (the "
            "official client needs Python 3.11 or newer)"
        ) from error
