"""`open_rows`: the rows of whatever a user names or hands over.

It knows what sources there are and which part of this room reads each; it reads nothing itself.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from .array_rows import ArrayRows
from .csv_rows import CsvRows, TsvRows
from .frames import frame_rows
from .index import check_regular
from .rows import JsonlRows, ListRows, Rows
from .tables import folder_rows, named_rows, parquet_rows
from .unpack import COMPRESSED, standard_input, unpacked
from .views import ManyRows

STANDARD_INPUT = "-"
_READERS: dict[str, Any] = {
    ".jsonl": JsonlRows, ".ndjson": JsonlRows, ".json": JsonlRows, ".csv": CsvRows, ".tsv": TsvRows,
}  # fmt: skip
_PATTERN = re.compile(r"[*?\[]")
_HUB = re.compile(
    r"(?P<scheme>hf://(?:datasets/)?)?(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<config>[\w-][\w.-]*))?"
    r"(?::(?P<split>.+))?"
)


def open_rows(source: Any) -> Rows:
    """The rows of a source.

    Args:
        source: a path of a file (JSONL, JSON, CSV, TSV or Parquet; compressed with gzip, bzip2, xz or zstd) or of a
            folder written by `save_to_disk`; a pattern of such paths, as `data/*.jsonl`; `-`, standard input; a data
            set of the hub, as `owner/name` or `hf://owner/name/config:split`; a list of dicts, a `datasets.Dataset`, a
            pandas or polars frame; or `Rows`.

    Raises:
        InputError: the source is missing, no regular file, of an unknown kind, empty or damaged.
        ConfigError: it takes a library that is not installed.
    """
    if isinstance(source, Rows):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return _from_python(source)
    text = os.fspath(source)
    path = Path(text)
    if text == STANDARD_INPUT:
        return _piped()
    if path.exists():
        return _from_path(path)
    if _PATTERN.search(text) and not text.startswith("hf://") and ":" not in text:
        return _from_pattern(text)
    named = _HUB.fullmatch(text)
    if named is not None and (named["scheme"] or path.suffix.lower() not in (*_READERS, *COMPRESSED, ".parquet")):
        try:
            return named_rows(named["name"], named["config"], named["split"] or "train")
        except InputError as error:
            if named["scheme"]:
                raise
            raise InputError(f"there is no file {text}, and {error}") from error
    raise InputError(
        f"{text} does not exist: give a JSONL, JSON, CSV or Parquet file, a datasets directory, or hf://owner/name"
    )


def _from_python(source: Any) -> Rows:
    rows = frame_rows(source)
    if rows is not None:
        return rows
    of_library = type(source).__module__.partition(".")[0] == "datasets"
    return ListRows(source.with_format(None) if of_library and hasattr(source, "with_format") else source,
                    filled=of_library)  # fmt: skip


def _from_pattern(text: str) -> Rows:
    """All files that fit, in the order of their names."""
    paths = sorted(glob.glob(text, recursive=True))
    if not paths:
        raise InputError(f"{text} fits no file")
    parts = [_from_path(Path(path)) for path in paths]
    return parts[0] if len(parts) == 1 else ManyRows(parts, text)


def _from_path(path: Path) -> Rows:
    if path.is_dir():
        return folder_rows(path)
    try:
        check_regular(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    kind = path.suffix.lower()
    if kind in COMPRESSED:
        kind = Path(path.stem).suffix.lower()
        _check_known(path, kind)
        if kind == ".parquet":
            raise InputError(f"{path}: Parquet files are compressed inside; unpack it first")
        return _named(kind, unpacked(path), str(path))
    _check_known(path, kind)
    return parquet_rows(path) if kind == ".parquet" else _reader(kind, path)(path)


def _check_known(path: Path, kind: str) -> None:
    if kind not in _READERS and kind != ".parquet":
        raise InputError(
            f"{path}: the ending {kind!r} is not known; data files are .jsonl, .json, .csv, .tsv or .parquet, plain or "
            f"compressed ({', '.join(COMPRESSED)})"
        )


def _named(kind: str, copy: Path, name: str) -> Rows:
    """Rows of a copy, which messages call by the name of what it is a copy of."""
    try:
        rows: Rows = _reader(kind, copy)(copy, name)
    except InputError as error:
        raise InputError(str(error).replace(str(copy), name)) from error
    return rows


def _piped() -> Rows:
    """JSON lines or an array, whichever it is."""
    return _named(".json", standard_input(), "standard input")


def _reader(kind: str, path: Path) -> Any:
    return ArrayRows if kind == ".json" and _is_array(path) else _READERS[kind]


def _is_array(path: Path) -> bool:
    """Whether a .json file holds one array; many hold JSON lines."""
    with open(path, "rb") as file:
        while chunk := file.read(4096):
            if text := chunk.removeprefix(b"\xef\xbb\xbf").lstrip():
                return text.startswith(b"[")
    return False
