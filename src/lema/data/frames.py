"""Rows of data frames of pandas and polars, by what frames have in common; neither library is imported.

It knows how frames give a row, and what stands in them for nothing; it knows nothing of what rows mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rows import ListRows, Rows


def frame_rows(source: Any) -> Rows | None:
    """Rows of a frame, null where a cell has no value; None where the source is no frame."""
    home = type(source).__module__.partition(".")[0]
    if home == "pandas" and hasattr(source, "iloc") and hasattr(source, "columns"):
        return ListRows(_PandasRows(source), "pandas frame", filled=True)
    if home == "polars" and hasattr(source, "collect") and not hasattr(source, "row"):
        source = source.collect()  # a lazy frame
    if home == "polars" and hasattr(source, "row"):
        return ListRows(_PolarsRows(source), "polars frame", filled=True)
    return None


class _PandasRows:
    def __init__(self, frame: Any) -> None:
        self._frame = frame
        self._columns = [str(name) for name in frame.columns]

    def __len__(self) -> int:
        return len(self._frame)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self._frame):
            raise IndexError(index)  # ends an iteration
        cells = next(self._frame.iloc[index : index + 1].itertuples(index=False, name=None))
        return {name: _plain(cell) for name, cell in zip(self._columns, cells, strict=True)}


class _PolarsRows:
    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def __len__(self) -> int:
        return len(self._frame)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self._frame):
            raise IndexError(index)
        row: dict[str, Any] = self._frame.row(index, named=True)
        return row


def _plain(value: Any) -> Any:
    """A cell as JSON has it: arrays as lists, numpy's scalars as Python's, and null for NaN, NaT and NA."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return None if missing else value
