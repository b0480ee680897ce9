"""`table`: facts out of the tables beside this file, whose answers no rule computes.

A table is UTF-8 text with tabs between its cells: the ways to ask, the answer, the explanation, the confidence, and
other right forms of the answer. Ways and forms have ` | ` between them. Lines that begin with `#` name the source.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from importlib.resources import files
from typing import get_args

from ..grammar import Confidence
from ..rows import Fact

_BETWEEN = " | "


def table(name: str, single: bool = False) -> Iterator[Fact]:
    """The facts of `NAME.tsv`, each named after the first way to ask for it."""
    text = files(__package__).joinpath(f"{name}.tsv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
        questions = tuple(row["questions"].split(_BETWEEN))
        accepted = tuple(row["accepted"].split(_BETWEEN)) if row["accepted"] else ()
        (confidence,) = (one for one in get_args(Confidence) if one == row["confidence"])
        yield Fact(
            f"{name}/{questions[0]}", questions, row["answer"], row["explanation"], confidence, accepted, single=single
        )
