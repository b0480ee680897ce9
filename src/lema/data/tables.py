"""Rows of Parquet files, folders of `datasets` and data sets of the hub, read by the `datasets` library.

It knows that library and what its files are called; it knows nothing of what rows mean. The library copies what it
reads into its own memory-mapped form under the cache folder, so memory stays flat.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputError
from ..libraries import how_to_install
from ..storage.cache import cache_folder
from .rows import Fingerprint, ListRows, Rows


def parquet_rows(path: Path) -> Rows:
    """Rows of a Parquet file.

    Raises:
        InputError: it is damaged or empty.
        ConfigError: `datasets` is not installed.
    """
    datasets = _library(path)
    with _told_in_our_words(datasets, str(path), path.suffix):
        table = datasets.load_dataset("parquet", data_files=str(path.resolve()), split="train", cache_dir=_cache())
    return ListRows(table, str(path), _fingerprint(path.name, [path]), filled=True)


def folder_rows(path: Path) -> Rows:
    """Rows of a folder written by `save_to_disk`.

    Raises:
        InputError: it is none, has several splits, or is damaged.
        ConfigError: `datasets` is not installed.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        raise InputError(f"{path} holds several splits: give one of {', '.join(str(path / s) for s in splits)}")
    if not (path / "state.json").is_file():
        raise InputError(
            f"{path} is a directory, but not one written by datasets' save_to_disk: give a data file, or several with "
            f"a pattern such as {path / '*.jsonl'}"
        )
    datasets = _library(path)
    with _told_in_our_words(datasets, str(path), "a datasets directory"):
        table = datasets.load_from_disk(str(path))
    return ListRows(table, str(path), _fingerprint(path.name, sorted(path.glob("*.arrow"))), filled=True)


def named_rows(name: str, config: str | None, split: str) -> Rows:
    """Rows of a data set of the hub, downloaded once, or of a folder of data files that has such a name.

    Args:
        name: `owner/name`.
        config: one of its configurations; None: the only one.
        split: as `datasets` has them, with parts: `train`, `train[:1000]`.

    Raises:
        InputError: there is none of that name, configuration or split, or the hub cannot be reached.
        ConfigError: `datasets` is not installed.
    """
    datasets = _library(name)
    said = f"hf://{name}{f'/{config}' if config else ''}:{split}"
    with _told_in_our_words(datasets, said, "a data set of the hub"):
        table = datasets.load_dataset(name, config, split=split, cache_dir=_cache(), trust_remote_code=False)
    files = [Path(file["filename"]) for file in table.cache_files]
    return ListRows(table, said, _fingerprint(said, files, split), filled=True)


def _cache() -> str | None:
    folder = cache_folder()
    return str(folder / "datasets") if folder is not None else None


def _library(what: object) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"reading {what} takes the datasets library: {how_to_install('datasets')}, or give the rows as JSONL"
        ) from error
    return datasets


@contextlib.contextmanager
def _told_in_our_words(datasets: Any, name: str, kind: str) -> Iterator[None]:
    """The library's errors as ours, its progress bars and log off meanwhile."""
    import pyarrow
    from datasets.utils import logging as talk
    from huggingface_hub.errors import HTTPError

    shown, level = datasets.are_progress_bars_disabled(), talk.get_verbosity()
    datasets.disable_progress_bars()
    talk.set_verbosity(talk.CRITICAL)
    try:
        yield
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        HTTPError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:
        cause = error.__cause__ or error
        raise InputError(f"{name} cannot be read as {kind}: {cause}") from error
    finally:
        talk.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()


def _fingerprint(name: str, files: list[Path], part: str = "") -> Fingerprint:
    """Of the bytes of files, in their order, and of which part of them is meant; who knows it adds how many rows."""
    hasher, num_bytes = hashlib.sha256(part.encode()), 0
    for file in files:
        with open(file, "rb") as opened:
            while chunk := opened.read(8 << 20):
                hasher.update(chunk)
                num_bytes += len(chunk)
    return {"name": name, "bytes": num_bytes, "sha256": hasher.hexdigest()}
