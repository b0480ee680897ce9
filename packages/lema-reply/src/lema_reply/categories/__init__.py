"""The eight categories: each makes its facts out of tables and arithmetic, the same ones for the same seed.

Each says what is true and how it is asked for; how many rows are wanted of it, and where they go, is `build`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from ..rows import Fact
from .general import facts as general
from .geography import facts as geography
from .history import facts as history
from .lema import facts as lema
from .maths import facts as maths
from .practical import facts as practical
from .science import facts as science
from .technology import facts as technology

FACTS: dict[str, Callable[[Random], Iterable[Fact]]] = {
    "science": science,
    "history": history,
    "geography": geography,
    "maths": maths,
    "technology": technology,
    "general": general,
    "lema": lema,
    "practical": practical,
}

__all__ = ["FACTS"]
