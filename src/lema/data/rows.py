"""`Rows`: raw rows of a data set by their number, wherever they are, in little memory.

It knows files, rows as dicts and what identifies them; it knows nothing of what their fields mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .index import Scan, row_index

Fingerprint = dict[str, Any]
"""What identifies the rows: `name`, `bytes`, `sha256`, `rows`."""


class Rows(ABC):
    """Rows that can be asked for in any order. Reading a bad one is an `InputError` that says where it is."""

    name: str
    """The file's name, or what stands for it in messages."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """How a message names a row: counted from 1."""
        return f"{self.name}, row {index + 1}"

    @property
    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """int64 `[rows]`: about how long each row is, for grouping."""

    @property
    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """JSON-ready; equal for equal content, whenever and wherever it is read."""


class FileChangedError(InputError):
    """A file is no longer what was indexed: no row of it can be trusted."""


class FileRows(Rows):
    """Rows of a file, each read where it is; the file is hashed and indexed once.

    Args:
        path: of the file.
        name: what messages call it, where `path` is a copy; None: the path.

    Raises:
        InputError: the file is missing, unreadable or has no rows.
    """

    scan: Scan | None = None
    """Finds the rows of such a file; None: each line that is not blank is one."""
    kind = "lines"
    """The scan's name among the kept indices."""

    def __init__(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        self.path = Path(path)
        self.name = str(path) if name is None else name
        self._index = row_index(self.path, type(self).scan, self.kind)
        if len(self._index.spans) == 0:
            raise InputError(f"{self.name} has no rows{self._why_none()}")
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - open as long as the rows are
        self._check_unchanged()

    def __len__(self) -> int:
        return len(self._index.spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        offset, length, _ = self._index.spans[index].tolist()
        data = os.pread(self._file.fileno(), length, offset)
        while len(data) < length and (more := os.pread(self._file.fileno(), length - len(data), offset + len(data))):
            data += more  # one call reads 2 GiB at most
        self._check_unchanged()
        return self._parse(data, index)

    @abstractmethod
    def _parse(self, data: bytes, index: int) -> dict[str, Any]:
        """The row that is written as these bytes."""

    def _why_none(self) -> str:
        return ": it is empty, or has blank lines only"

    def where(self, index: int) -> str:
        return f"{self.name}, line {self._index.line(index)}"

    @property
    def byte_lengths(self) -> np.ndarray:
        lengths: np.ndarray = self._index.spans[:, 1]
        return lengths

    @property
    def fingerprint(self) -> Fingerprint:
        return {
            "name": Path(self.name).name, "bytes": self._index.num_bytes, "sha256": self._index.sha256,
            "rows": len(self),
        }  # fmt: skip

    def _check_unchanged(self) -> None:
        stat = os.fstat(self._file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (self._index.num_bytes, self._index.mtime_ns):
            raise FileChangedError(
                f"{self.name} was changed while it is in use: its rows are no longer where they were"
            )


class JsonlRows(FileRows):
    """Rows of a JSONL file: one JSON object a line, blank lines passed over."""

    def _parse(self, data: bytes, index: int) -> dict[str, Any]:
        try:
            row = json.loads(data.decode("utf-8").removeprefix("\ufeff" if index == 0 else ""))
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where(index)} is not UTF-8: {bytes_at(data, error.start)}") from error
        except RecursionError as error:
            raise InputError(f"{self.where(index)} is nested too deeply to be read") from error
        except json.JSONDecodeError as error:
            raise InputError(
                f"{self.where(index)} is not JSON: {error.msg} (character {error.pos + 1}){self._hint(data)}"
            ) from error
        except ValueError as error:
            raise InputError(
                f"{self.where(index)} is not JSON that can be read: {str(error).partition(';')[0]}"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{self.where(index)} holds {_kind(row)}, not an object{self._hint(data)}")
        return row

    def _hint(self, data: bytes) -> str:
        """What else the file may be."""
        if data.lstrip()[:1] == b"[":
            return "; if the file is one JSON array, name it .json"
        if data.strip() == b"{":
            return "; an object must be on one line (`jq -c . FILE`), or the file be a JSON array named .json"
        return ""


class ListRows(Rows):
    """Rows of a list of dicts, or of anything with a length and dicts by number, as a `datasets.Dataset` is.

    Args:
        rows: the rows; not copied.
        name: what messages and the fingerprint call them.
        fingerprint: of the file they came from; None: made from the rows' content.
        filled: the rows come from a table whose objects all have the same fields, those that a row lacks being null,
            as Arrow's do: such nulls inside a row are left out. Nulls of lists stay.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]] | Any, name: str = "dataset", fingerprint: Fingerprint | None = None,
        *, filled: bool = False,
    ) -> None:  # fmt: skip
        if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__") or isinstance(rows, (str, bytes, Mapping)):
            raise InputError(
                f"rows of type {type(rows).__name__} cannot be asked for by number: give a path, a list of dicts or a "
                "datasets.Dataset (of a DatasetDict, one of its splits)"
            )
        if len(rows) == 0:
            raise InputError(f"{name} has no rows")
        self.name = name
        self._rows = rows
        self._fingerprint = fingerprint
        self._filled = filled

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise InputError(f"{self.where(index)} holds {_kind(row)}, not an object")
        if self._filled:
            return {name: _without_nulls(value) for name, value in row.items()}
        return dict(row)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """int64 `[rows]`: bytes of each row's text."""
        return np.array([_text_bytes(row) for row in self._rows], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the rows' contents, or of the file they came from."""
        if self._fingerprint is not None:
            return {**self._fingerprint, "rows": len(self)}
        hasher, num_bytes = hashlib.sha256(), 0
        for row in self._rows:
            line = json.dumps(row, sort_keys=True, default=str).encode() + b"\n"
            hasher.update(line)
            num_bytes += len(line)
        return {"name": self.name, "bytes": num_bytes, "sha256": hasher.hexdigest(), "rows": len(self)}


class SomeRows(Rows):
    """Some of the rows of others, by their numbers; messages keep the others' words for where a row is."""

    def __init__(self, rows: Rows, indices: np.ndarray) -> None:
        self.name = rows.name
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[int(self._indices[index])]

    def where(self, index: int) -> str:
        return self._rows.where(int(self._indices[index]))

    @property
    def byte_lengths(self) -> np.ndarray:
        lengths: np.ndarray = self._rows.byte_lengths[self._indices]
        return lengths

    @cached_property
    def fingerprint(self) -> Fingerprint:
        chosen = hashlib.sha256(self._indices.astype("<i8").tobytes()).hexdigest()
        return {**self._rows.fingerprint, "rows": len(self), "chosen": chosen}


def fingerprint_difference(stored: Fingerprint, found: Fingerprint) -> str | None:
    """What a data set differs in from a stored fingerprint, in words; None where its content is the same.

    Names do not count: a file may be moved.
    """
    if all(stored.get(key) == found.get(key) for key in ("bytes", "sha256", "rows", "chosen", "columns")):
        return None
    parts = [f"{stored.get('name')} then, {found.get('name')} now"] if stored.get("name") != found.get("name") else []
    for key, unit in (("rows", "rows"), ("bytes", "bytes")):
        if stored.get(key) != found.get(key):
            parts.append(f"{stored.get(key)} {unit} then, {found.get(key)} now")
    if stored.get("sha256") != found.get("sha256"):
        parts.append(f"content {str(stored.get('sha256'))[:12]} then, {str(found.get('sha256'))[:12]} now")
    if stored.get("columns") != found.get("columns"):
        parts.append(f"columns {stored.get('columns')} then, {found.get('columns')} now")
    if stored.get("chosen") != found.get("chosen"):
        parts.append("other rows of it are held out (eval_size or the seed changed)")
    return "; ".join(parts)


def _without_nulls(value: Any) -> Any:
    """A value without the null fields of the objects in it."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _text_bytes(value: Any) -> int:
    """Bytes of all text inside a row."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, Mapping):
        return sum(_text_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_text_bytes(item) for item in value)
    return 0


def bytes_at(data: bytes, start: int) -> str:
    """What of bytes that are no UTF-8 a message says."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it begins like UTF-16; convert the file with `iconv -f UTF-16 -t UTF-8`"
    return f"byte {start + 1} of the line is 0x{data[start]:02x}"
