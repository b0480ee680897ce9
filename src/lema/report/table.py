"""Columns of numbers that grow line by line, ordered by step when all are there.

Columns may appear late and have gaps.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

LARGEST, SMALLEST = 1e100, 1e-100
"""Greater magnitudes are no measurement and count as not finite, smaller ones as zero: figures made of such numbers
overflow."""


class Table:
    """Flat memory: eight bytes a number. A value that is missing or not finite is NaN.

    Args:
        names: of the columns beside `step`.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.steps = array("q")
        self.columns = {name: array("d") for name in names}
        self.not_finite: Counter[str] = Counter()
        """How many values of a column were given but are no finite number."""
        self.superseded = 0
        """Lines of steps that were taken again after a resume."""

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, name: str) -> array[float]:
        return self.columns[name]

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line."""
        self.steps.append(step)
        for name, column in self.columns.items():
            value = values.get(name)
            number = as_number(value)
            if value is not None and number != number:
                self.not_finite[name] += 1
            column.append(number)

    def forget_after(self, step: int) -> None:
        """Lines of later steps do not count: the run was resumed after this one."""
        self._keep([row for row, known in enumerate(self.steps) if known <= step])

    def settle(self) -> None:
        """Order by step; of lines with the same step the last one stays."""
        if all(a < b for a, b in zip(self.steps, self.steps[1:])):
            return
        order = sorted(range(len(self.steps)), key=self.steps.__getitem__)
        following = [*order[1:], None]
        self._keep([a for a, b in zip(order, following) if b is None or self.steps[a] != self.steps[b]])

    def _keep(self, rows: list[int]) -> None:
        self.superseded += len(self.steps) - len(rows)
        self.steps = array("q", [self.steps[row] for row in rows])
        self.columns = {name: array("d", [column[row] for row in rows]) for name, column in self.columns.items()}


def as_number(value: Any) -> float:
    """A finite number as it is, anything else as NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        return math.nan
    return float(value) if abs(value) >= SMALLEST else 0.0


def as_step(value: Any) -> int | None:
    """A step's number, or None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        return None
    return value
