"""What stands beside the weights in a transformers folder: configuration, generation settings, tokenizer, templates.

Of the weights only their type matters here, for the configuration.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

from ..errors import ConfigError, WeightsError
from ..storage.header import read_json_object
from .gguf_source import GgufSource
from .locate import COMPANIONS, fetch_companions

CONFIG = "config.json"
GENERATION = "generation_config.json"
_TEMPLATES = "additional_chat_templates"


def find_companions(path: Path, given: str | None) -> Path | None:
    """The folder with the model's config.json: the one given (or a hub id), that of the weights, or None.

    Raises:
        ConfigError: the one given has no config.json.
    """
    if given is None:
        return path.parent if (path.parent / CONFIG).is_file() else None
    folder = Path(given).expanduser()
    if folder.is_file():
        folder = folder.parent
    if not folder.exists():
        folder = fetch_companions(given)
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder / CONFIG}: does not exist. Give a model's folder or hub id with --config")
    return folder


def read_config(folder: Path | None, path: Path) -> dict[str, Any]:
    """config.json as a dict; `ConfigError` without one."""
    if folder is None:
        raise ConfigError(
            f"{path.parent / CONFIG}: does not exist, so nothing says what model {path.name} is. Give the folder or "
            "hub id of the same model with --config"
        )
    return dict(read_json_object(folder / CONFIG))


def write_companions(
    output: Path, folder: Path | None, values: dict[str, Any], dtype: torch.dtype | None, gguf: GgufSource | None
) -> None:
    """Copy or make everything but the weights.

    Args:
        folder: where they are; None: a GGUF file has them.
        values: the configuration to write, as config.json has it.
        dtype: of the weights, for the configuration; None: as it says.
    """
    try:
        if folder is not None:
            _copy(folder, output)
        elif gguf is not None:
            gguf.save_tokenizer(output)
        text = json.dumps(_with_dtype(values, dtype), indent=2, sort_keys=True) + "\n"
        (output / CONFIG).write_text(text, encoding="utf-8")
        if not (output / GENERATION).exists() and values.get("model_type") in CONFIG_MAPPING:
            config = AutoConfig.from_pretrained(output, trust_remote_code=False)
            GenerationConfig.from_model_config(config).save_pretrained(output)
    except OSError as error:
        raise WeightsError(f"{output}: writing failed: {error}. Check the disk and its permissions.") from error


def _copy(folder: Path, output: Path) -> None:
    names = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(names):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, output / file.name)
    if (folder / _TEMPLATES).is_dir():
        shutil.copytree(folder / _TEMPLATES, output / _TEMPLATES, dirs_exist_ok=True)


def _with_dtype(values: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    if dtype is None:
        return values
    name = str(dtype).removeprefix("torch.")
    changed = {key: value for key, value in values.items() if key != "torch_dtype"} | {"dtype": name}
    for key, part in changed.items():
        if isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part):
            changed[key] = {k: v for k, v in part.items() if k != "torch_dtype"} | {"dtype": name}
    return changed
