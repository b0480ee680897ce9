"""Rows of JSON arrays, CSV, Parquet and `datasets` directories, read by the `datasets` library.

It knows that library and what its files are called; it knows nothing of what rows mean. The library copies what it
reads into its own memory-mapped form under the cache folder, so memory stays flat.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..cache import cache_folder
from ..errors import ConfigError, InputError
from ..libraries import how_to_install
from .rows import Fingerprint, JsonlRows, ListRows, Rows

_BUILDERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_LINES = (".jsonl", ".ndjson")


def open_rows(source: Any) -> Rows:
    """The rows of a path, or of rows already in Python: a list of dicts, a `datasets.Dataset`, or `Rows`.

    Raises:
        InputError: the source is missing, of an unknown kind, empty or damaged.
        ConfigError: it takes the `datasets` library, which is not installed.
    """
    if isinstance(source, Rows):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return ListRows(source)
    path = Path(source)
    if path.is_dir():
        return _from_directory(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a JSONL, JSON, CSV or Parquet file, or a datasets directory")
    kind = path.suffix.lower()
    if kind in _LINES or (kind == ".json" and not _is_array(path)):
        return JsonlRows(path)
    if kind not in _BUILDERS:
        raise InputError(
            f"{path}: the ending {kind!r} is not known; data files are .jsonl, .json, .csv, .tsv or .parquet. "
            "Compressed files must be unpacked first"
        )
    return _from_file(path, kind)


def _is_array(path: Path) -> bool:
    """Whether a .json file holds one array; many hold JSON lines."""
    with open(path, "rb") as file:
        while chunk := file.read(4096):
            if text := chunk.removeprefix(b"\xef\xbb\xbf").lstrip():
                return text.startswith(b"[")
    return False


def _from_file(path: Path, kind: str) -> Rows:
    datasets = _library(path)
    options: dict[str, Any] = {}
    if kind in (".csv", ".tsv"):
        options = _csv_options(datasets, path, "\t" if kind == ".tsv" else ",")
    folder = cache_folder()
    with _told_in_our_words(datasets, path):
        table = datasets.load_dataset(
            _BUILDERS[kind], data_files=str(path.resolve()), split="train",
            cache_dir=str(folder / "datasets") if folder is not None else None, **options,
        )  # fmt: skip
    return ListRows(table, str(path), _fingerprint(path.name, [path]))


def _csv_options(datasets: Any, path: Path, separator: str) -> dict[str, Any]:
    """Every column is text: what looks like a number, a date or "None" is an answer like any other."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=separator), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}, line 1 is no header of a UTF-8 CSV file: {error}") from error
    if not header or len(set(header)) != len(header):
        raise InputError(f"{path}, line 1 must name the columns, each once; it says {header}")
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": separator, "features": features, "keep_default_na": False, "encoding": "utf-8-sig"}


def _from_directory(path: Path) -> Rows:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        raise InputError(f"{path} holds several splits: give one of {', '.join(str(path / s) for s in splits)}")
    if not (path / "state.json").is_file():
        raise InputError(f"{path} is a directory, but not one written by datasets' save_to_disk: give a data file")
    datasets = _library(path)
    with _told_in_our_words(datasets, path):
        table = datasets.load_from_disk(str(path))
    return ListRows(table, str(path), _fingerprint(path.name, sorted(path.glob("*.arrow"))))


def _library(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"reading {path} takes the datasets library: {how_to_install('datasets')}, or give the rows as JSONL"
        ) from error
    return datasets


@contextlib.contextmanager
def _told_in_our_words(datasets: Any, path: Path) -> Iterator[None]:
    """The library's errors as ours, its progress bars and log off meanwhile."""
    import pyarrow
    from datasets.utils import logging as talk

    shown, level = datasets.are_progress_bars_disabled(), talk.get_verbosity()
    datasets.disable_progress_bars()
    talk.set_verbosity(talk.CRITICAL)
    try:
        yield
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise InputError(f"{path} cannot be read as {path.suffix or 'a datasets directory'}: {cause}") from error
    finally:
        talk.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()


def _fingerprint(name: str, files: list[Path]) -> Fingerprint:
    """Of the bytes of files, in their order; the number of rows is added by who knows it."""
    hasher, num_bytes = hashlib.sha256(), 0
    for file in files:
        with open(file, "rb") as opened:
            while chunk := opened.read(8 << 20):
                hasher.update(chunk)
                num_bytes += len(chunk)
    return {"name": name, "bytes": num_bytes, "sha256": hasher.hexdigest()}
