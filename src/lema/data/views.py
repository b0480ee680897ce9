"""Rows made of other rows: several sources one after the other, and fields under other names.

It knows numbers of rows and names of fields; it reads nothing itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from .checks import names
from .rows import Fingerprint, Rows

_LOOKED_AT = 16


class ManyRows(Rows):
    """The rows of several sources, one after the other; messages keep each source's words for where a row is.

    Args:
        parts: at least one.
        name: of all of them.
    """

    def __init__(self, parts: Sequence[Rows], name: str) -> None:
        self.name = name
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self._place(index)
        return part[row]

    def where(self, index: int) -> str:
        part, row = self._place(index)
        return part.where(row)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths: np.ndarray = np.concatenate([part.byte_lengths for part in self._parts])
        return lengths

    @cached_property
    def fingerprint(self) -> Fingerprint:
        prints = [part.fingerprint for part in self._parts]
        whole = hashlib.sha256("".join(str(one["sha256"]) for one in prints).encode()).hexdigest()
        return {
            "name": self.name, "bytes": sum(one["bytes"] for one in prints), "sha256": whole, "rows": len(self),
        }  # fmt: skip

    def _place(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], index - (int(self._ends[number - 1]) if number else 0)


class MappedRows(Rows):
    """Rows whose fields have other names.

    Args:
        rows: the rows as they are.
        columns: for a name this package knows, the field that holds it; None: no field does, and one of that name is
            not read.

    Raises:
        ConfigError: a field that is named is in none of the first rows.
    """

    def __init__(self, rows: Rows, columns: Mapping[str, str | None]) -> None:
        self.name = rows.name
        self._rows = rows
        self._columns = dict(columns)
        self._check_there()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        taken = {theirs for theirs in self._columns.values() if theirs is not None}
        mapped: dict[str, Any] = {}
        for name, value in row.items():
            if name not in taken:  # one that another field takes the place of is still seen to be there
                mapped[f"{name} (set aside by columns)" if name in self._columns else name] = value
        for ours, theirs in self._columns.items():
            if theirs is not None and theirs in row:
                mapped[ours] = row[theirs]
        return mapped

    def where(self, index: int) -> str:
        return self._rows.where(index)

    @property
    def byte_lengths(self) -> np.ndarray:
        return self._rows.byte_lengths

    @property
    def fingerprint(self) -> Fingerprint:
        return {**self._rows.fingerprint, "columns": self._columns}

    def _check_there(self) -> None:
        seen: dict[str, None] = {}
        for index in range(min(_LOOKED_AT, len(self._rows))):
            try:
                seen |= dict.fromkeys(self._rows[index])
            except InputError:
                continue
        for ours, theirs in self._columns.items():
            if seen and theirs is not None and theirs not in seen:
                raise ConfigError(
                    f"columns: {ours} is to be read from {theirs!r}, and the first rows of {self.name} have "
                    f"{names(seen)}"
                )
