"""Rows of CSV and TSV files, all of whose fields are text, each row read where it is.

It knows what a record of such a file is, as RFC 4180 and Python's `csv` have it; it knows nothing of what fields mean.
What looks like a number, a date or "None" is an answer like any other, so nothing is made of it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from .index import RowIndex
from .rows import FileRows, bytes_at

_LONGEST_FIELD = 2**31 - 1  # the library's own limit is 128 KiB
_OTHER_SEPARATORS = ";\t|,"


class _Record(NamedTuple):
    """Fields between two offsets of a file."""

    begin: int
    end: int
    line: int
    """On which it begins, from 1."""
    fields: list[str]


class CsvRows(FileRows):
    """Rows of a CSV file, whose first line names the columns.

    A row with more or fewer fields than there are columns is an `InputError` when it is read: which column the
    separator too many belongs to cannot be known.
    """

    kind = "csv"
    separator = ","

    def __init__(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        self.columns = _columns(Path(path), self.separator, str(path) if name is None else name)
        super().__init__(path, name)

    @staticmethod
    def scan(path: Path, stat: os.stat_result) -> RowIndex:
        """Where the records are."""
        return _scan(path, stat, ",")

    def _parse(self, data: bytes, index: int) -> dict[str, Any]:
        text = io.StringIO(data.decode("utf-8"), newline="")
        fields = next(csv.reader(text, delimiter=self.separator, strict=True))
        if len(fields) != len(self.columns):
            how = f"put a field that has a {_said(self.separator)} in it between double quotes"
            if len(fields) < len(self.columns):
                how = "an empty field needs its separator too"
            raise InputError(
                f"{self.where(index)} has {len(fields)} {'field' if len(fields) == 1 else 'fields'}, and line 1 names "
                f"{len(self.columns)} ({', '.join(self.columns)}): {how}"
            )
        return dict(zip(self.columns, fields, strict=True))

    def _why_none(self) -> str:
        return ": there is nothing after the line that names the columns"


class TsvRows(CsvRows):
    """Rows of a file whose fields are separated by tabs."""

    kind = "tsv"
    separator = "\t"

    @staticmethod
    def scan(path: Path, stat: os.stat_result) -> RowIndex:
        """Where the records are."""
        return _scan(path, stat, "\t")


def _scan(path: Path, stat: os.stat_result, separator: str) -> RowIndex:
    hasher = hashlib.sha256()
    records = _records(path, separator, hasher)
    next(records, None)
    spans = np.fromiter(
        (number for record in records for number in (record.begin, record.end - record.begin, record.line)), np.int64
    )
    return RowIndex(spans.reshape(-1, 3), hasher.hexdigest(), stat.st_size, stat.st_mtime_ns)


def _columns(path: Path, separator: str, name: str) -> list[str]:
    """What the first line says the columns are."""
    try:
        record = next(_records(path, separator), None)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    header = [] if record is None else record.fields
    if not any(header) or len(set(header)) != len(header):
        raise InputError(f"{name}, line 1 must name the columns, each once; it says {header}")
    if len(header) == 1 and (other := next((c for c in _OTHER_SEPARATORS if c in header[0]), None)) is not None:
        raise InputError(
            f"{name}, line 1 names one column, {header[0]!r}: fields must be separated by a {_said(separator)}, "
            f"not by a {_said(other)}"
        )
    return header


def _records(path: Path, separator: str, hasher: Any = None) -> Iterator[_Record]:
    """The records of a file one after the other; lines with nothing on them are passed over."""
    csv.field_size_limit(_LONGEST_FIELD)
    with open(path, "rb") as file:
        position, number, blank = 0, 0, True

        def lines() -> Iterator[str]:
            nonlocal position, number, blank
            for data in file:
                position, number, blank = position + len(data), number + 1, not data.strip(b" \r\n")
                if hasher is not None:
                    hasher.update(data)
                try:
                    yield data.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}, line {number} is not UTF-8: {bytes_at(data, error.start)}") from error

        reader = csv.reader(lines(), delimiter=separator, strict=True)
        begin, before = 0, 0
        try:
            for fields in reader:
                if not (blank and number == before + 1):
                    yield _Record(begin, position, before + 1, fields)
                begin, before = position, number
        except csv.Error as error:
            raise InputError(
                f"{path}, line {before + 1}: the record that begins here is not well formed ({error}); a double quote "
                "inside a quoted field is written twice"
            ) from error


def _said(separator: str) -> str:
    return {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}[separator]
