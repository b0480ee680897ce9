"""An adapter's directory and the base model it belongs to.

Both are only found and held against each other here: settings, tensors, configuration, weights.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedConfig

from ..config import CONFIG_NAME, LemaConfig
from ..engine.checkpoint import check_base
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..json_file import read_object
from ..models.locate import local_path
from ..models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..models.registry import get_adapter
from ..models.transformers_adapter import TransformersAdapter
from ..storage.index import GlobalBinaryIndex

logger = logging.getLogger(__name__)

_AROUND_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")
_BASE_NEEDED = "say which model the adapter was trained on with --base"


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a PEFT adapter, such as training writes."""

    folder: Path
    settings: dict[str, Any]
    """adapter_config.json as it is."""
    base: str
    """Directory, `.safetensors` file or hub id of the base model."""
    weights: str | None
    """A weights file apart from `base`."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Checkpoint:
        """The checkpoint in a directory.

        Args:
            base: the base model, where the checkpoint's own note of it is missing or no longer right.

        Raises:
            CheckpointError: no adapter there, or its settings cannot be read.
            UnsupportedError: an adapter that is not LoRA.
            ConfigError: nothing says what the base model is.
        """
        path = Path(folder)
        settings = read_settings(path)
        if settings.get("peft_type") != "LORA":
            raise UnsupportedError(f"{path}: is a {settings.get('peft_type')} adapter; only LoRA can be taken further")
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise CheckpointError(
                f"{path / ADAPTER_WEIGHTS} does not exist. Load the adapter with PEFT and save it again as safetensors"
            )
        own = LemaConfig.from_pretrained(path) if (path / CONFIG_NAME).is_file() else None
        named = own.model_name_or_path if own is not None else settings.get("base_model_name_or_path")
        apart = own.gbi_path if own is not None else None
        if base is not None:
            given = Path(base)
            if given.suffix != ".safetensors" or (given.parent / "config.json").is_file() or not named:
                named, apart = os.fspath(base), None
            else:
                apart = os.fspath(base)
        if not named:
            raise ConfigError(f"{path} does not name its base model: {_BASE_NEEDED}")
        return cls(path, settings, str(named), None if apart is None else os.fspath(apart))

    def lora_config(self) -> LoraConfig:
        """PEFT's configuration of the adapter; `CheckpointError` where PEFT refuses it."""
        try:
            return LoraConfig.from_pretrained(str(self.folder))
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.folder / ADAPTER_CONFIG} is refused by PEFT: {error}") from error

    def tensors(self) -> GlobalBinaryIndex:
        """Index of the adapter's tensors."""
        return GlobalBinaryIndex(self.folder / ADAPTER_WEIGHTS)

    def base_folder(self, weights: bool = False) -> Path:
        """The base's configuration and tokenizer, fetched from the hub if need be, its weights too if asked for.

        Raises:
            WeightsNotFoundError: neither here nor on the hub.
        """
        path = local_path(self.base, *_AROUND_WEIGHTS, *(["*.safetensors"] if weights and self.weights is None else []))
        return path if path.is_dir() else path.parent

    def base_weights(self) -> GlobalBinaryIndex:
        """Index of the base's weights."""
        if self.weights is not None:
            return GlobalBinaryIndex(self.weights)
        path = Path(self.base)
        return GlobalBinaryIndex(path if path.is_file() else self.base_folder(weights=True))

    def check_base(self, weights: GlobalBinaryIndex) -> None:
        """Compare the base's weights with those the adapter was trained on, as far as the checkpoint notes them.

        Files cut otherwise, as `prepare` does, cannot be compared; that is said in a warning.

        Raises:
            CheckpointError: they are others.
        """
        path = self.folder / "trainer_state.json"
        if not path.is_file():
            return
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))["lema"]["base_weights"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
            return  # of another trainer
        here = weights.fingerprint()
        if {*noted} == {*here}:
            check_base(self.folder, noted, here)
        else:
            logger.warning(
                "%s was trained on %s, and here is %s: whether these are the same weights cannot be told",
                self.folder, ", ".join(sorted(noted)), ", ".join(sorted(here)),
            )  # fmt: skip

    def base_config(self) -> dict[str, Any]:
        """The base's configuration.

        Raises:
            ConfigError: there is none, or it does not say what model it is.
        """
        folder = self.base_folder()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder / 'config.json'} does not exist, so nothing says what {self.base} is")
        values, _ = PreTrainedConfig.get_config_dict(folder)
        if not values.get("model_type"):
            raise ConfigError(f"{folder / 'config.json'} has no model_type, so nothing says what {self.base} is")
        return dict(values)

    def base_model(self) -> TransformersAdapter:
        """The base without weights.

        Raises:
            UnsupportedError: not a causal language model of transformers, or one of codes that are not known.
        """
        values = self.base_config()
        adapter = get_adapter(values["model_type"], values)
        if not isinstance(adapter, TransformersAdapter):
            raise UnsupportedError(
                f"model type {values['model_type']!r} has an adapter of its own and cannot be merged"
            )
        adapter.configure(torch.float32)
        return adapter


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a directory.

    Raises:
        CheckpointError: missing or not JSON; directories below it that hold an adapter are named.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"; there are {', '.join(str(folder / name) for name in inside)}" if inside else ""
        raise CheckpointError(f"{path} does not exist: {folder} holds no PEFT adapter{hint}")
    return read_object(path)
