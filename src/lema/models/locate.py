"""Where a model is, local or on the hub, and what its config.json says it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from ..config import LemaConfig
from ..errors import ConfigError, WeightsNotFoundError
from ..storage.gguf_header import is_gguf
from ..storage.strangers import refuse_special_files, tell_of_code
from .base import LemaModelAdapter
from .folder import refuse_other_folders
from .gguf import config_in
from .registry import get_adapter
from .transformers_adapter import TransformersAdapter

_FILES = (".safetensors", ".gguf")
_ADAPTER = ("adapter_model.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # with its tokenizer, if it has one


def local_path(name_or_path: str, *patterns: str) -> Path:
    """A local path for a path or a hub id; files of a hub id come through huggingface_hub's cache.

    Raises:
        WeightsNotFoundError: it is neither. ConfigError: it is there, and no model.
    """
    path = Path(name_or_path)
    if not path.exists():
        path = _fetched(name_or_path, patterns, "a model", "a directory, a .safetensors or .gguf file or a hub id")
    refuse_other_folders(path)
    return path


def adapter_path(name_or_path: str) -> Path:
    """The folder of a PEFT adapter: a local one, or that of a hub id in huggingface_hub's cache.

    Raises:
        WeightsNotFoundError: it is neither.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    return _fetched(name_or_path, _ADAPTER, "an adapter", "an adapter's directory, or its hub id")


def _fetched(name_or_path: str, patterns: Sequence[str], what: str, instead: str) -> Path:
    """Files of a hub id, downloaded once; without a network those that are there."""
    path = Path(name_or_path)
    could_be_hub_id = name_or_path.count("/") <= 1 and path.suffix not in _FILES and not path.is_absolute()
    if not could_be_hub_id or name_or_path.startswith("."):
        raise WeightsNotFoundError(f"{name_or_path} does not exist: give {instead}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsNotFoundError(
            f"{name_or_path!r} is neither a local path nor {what} that could be fetched from the hub: {error}"
        ) from error


def weights_path(config: LemaConfig) -> Path:
    """Where a config's weights are: `gbi_path`, or the model's own files."""
    if config.gbi_path is not None:
        return Path(config.gbi_path)
    return local_path(config.model_name_or_path, "*.json", "*.safetensors")


def adapter_for(config: LemaConfig, model_path: Path) -> LemaModelAdapter:
    """The adapter for the model whose config.json is at, or beside, `model_path`; of a GGUF file, that is in it.

    Raises:
        ConfigError: there is none, or it does not say what the model is.
    """
    if is_gguf(model_path):
        own = config_in(model_path)
        own._name_or_path = config.model_name_or_path
        return TransformersAdapter(own)
    folder = model_path if model_path.is_dir() else model_path.parent
    path = folder / "config.json"
    refuse_special_files(folder)
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist, so nothing says what {config.model_name_or_path} is; put the model's config.json "
            "there, name a model directory and give the weights as gbi_path, or build LemaModel with an adapter"
        )
    values, _ = PreTrainedConfig.get_config_dict(folder)
    tell_of_code(folder)
    model_type = config.model_type or values.get("model_type")
    if not model_type:
        raise ConfigError(f"{path} has no model_type; give LemaConfig(model_type=...)")
    adapter = get_adapter(model_type, values)
    if hasattr(adapter, "config") and isinstance(adapter.config, PreTrainedConfig):
        adapter.config._name_or_path = config.model_name_or_path
    return adapter
