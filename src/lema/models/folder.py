"""Folders that are given as a model and are something else: said by name, before anything in them is taken for one.

It knows which files give a folder away; it knows nothing of what is in them beyond the names they point to.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, LemaError
from ..json_file import read_object

_ADAPTER_CONFIG = "adapter_config.json"  # PEFT's and mlx-lm's
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def refuse_other_folders(folder: Path) -> None:
    """Refuse an adapter's folder or file, a run's folder, a pipeline's or one of GGUF files; anything else passes.

    Raises:
        ConfigError: says what it is and what to give in its place.
    """
    if folder.name in _ADAPTER_WEIGHTS and folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        return
    if (folder / _ADAPTER_CONFIG).is_file():
        _refuse_adapter(folder)
    if (folder / "config.json").is_file():
        return
    adapters = sorted(path.parent for path in folder.glob(f"*/{_ADAPTER_CONFIG}"))
    if adapters and ((folder / "run.yaml").is_file() or any(path.name.startswith("checkpoint-") for path in adapters)):
        final = next((path for path in adapters if path.name == "final"), adapters[-1])
        raise ConfigError(
            f"{folder} is the folder of a run, not a model: it holds adapters ({', '.join(p.name for p in adapters)}). "
            f"Give the model that was trained on{_named(_base_of(final))}; to talk with the adapter: lema chat {final}"
        )
    if (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} is a pipeline of diffusers, not a language model: give the folder of one")
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        raise ConfigError(
            f"{folder} holds GGUF files ({', '.join(ggufs[:3])}) and no config.json: give one of them, as in "
            f"{folder / ggufs[0]}"
        )


def _refuse_adapter(folder: Path) -> None:
    base = _named(_base_of(folder))
    if any((folder / name).is_file() for name in _WEIGHTS):
        raise ConfigError(
            f"{folder} holds a model and an adapter ({_ADAPTER_CONFIG}), of which transformers would take the adapter "
            f"and the model it names{base}. Give that one, or move {_ADAPTER_CONFIG} away to mean the weights beside it"
        )
    raise ConfigError(
        f"{folder} is the folder of an adapter ({_ADAPTER_CONFIG}), not of a model: give the model that it belongs to"
        f"{base}; to talk with the adapter: lema chat {folder}"
    )


def _base_of(folder: Path) -> str | None:
    try:
        values = read_object(folder / _ADAPTER_CONFIG)
    except (OSError, LemaError):
        return None
    name = values.get("base_model_name_or_path") or values.get("model")
    return name if isinstance(name, str) else None


def _named(base: str | None) -> str:
    return f" ({base})" if base else ""
