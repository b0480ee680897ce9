"""What stands beside the weights in a model's directory: configuration, tokenizer, chat template, card.

Each is known by its name and copied or written anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..models.families import auto_name_of
from .checkpoint import Checkpoint

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATES = tuple(name for name in TOKENIZER_FILES if name.startswith("chat_template"))
_MORE_TEMPLATES = "additional_chat_templates"  # where transformers writes those with names
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_WRITTEN = ("config.json", CARD)


def write_surroundings(checkpoint: Checkpoint, folder: Path, dtype: str | None) -> list[str]:
    """Write everything but the weights; returns the files' names.

    Tokenizer and chat template are the checkpoint's where it has them, as it was trained with those.

    Args:
        dtype: of the weights, where it is not the base's.
    """
    base = checkpoint.base_folder(weights=checkpoint.weights is None)
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # codes were decoded
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _copy_tokenizer_and_template(checkpoint.folder, base, folder)
    _copy(base, folder, _others(base))
    text = (
        f"{_settings(checkpoint)} It was merged into `{_name(checkpoint)}` in float32, and the result cast to "
        f"{dtype or 'the type the base is stored in'}."
    )
    title = f"{_name(checkpoint)} with a LoRA adapter merged in"
    auto = auto_name_of(config)
    use = [
        f"from transformers import {auto}, AutoTokenizer", "",
        f'model = {auto}.from_pretrained("PATH")', 'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    ]  # fmt: skip
    card = _card(checkpoint, _license(base / CARD), "transformers", "merged", title, text, use)
    (folder / CARD).write_text(card, encoding="utf-8")
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".safetensors" and path.name[0] != ".")


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy tokenizer and chat template, if there are any; whether there were."""
    return _copy(source, folder, TOKENIZER_FILES)


def _copy_tokenizer_and_template(checkpoint: Path, base: Path, folder: Path) -> None:
    """Each from the checkpoint if it has one, else from the base: a template alone is no tokenizer."""
    for names in (tuple(name for name in TOKENIZER_FILES if name not in _TEMPLATES), _TEMPLATES):
        if not _copy(checkpoint, folder, names):
            _copy(base, folder, names)


def _others(base: Path) -> tuple[str, ...]:
    """Files of a model's folder that are neither weights nor written anew: settings of generation and of processors of
    images and sound, licences, whatever else belongs to it."""
    names = (path.name for path in base.iterdir() if path.is_file())
    own = {*TOKENIZER_FILES, *_WRITTEN}
    return tuple(sorted(name for name in names if name not in own and name[0] != "." and not name.endswith(_WEIGHTS)))


def write_adapter_card(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the card of an adapter."""
    use = [
        "from peft import AutoPeftModelForCausalLM", "",
        'model = AutoPeftModelForCausalLM.from_pretrained("PATH")',
    ]  # fmt: skip
    text = _card(checkpoint, None, "peft", "lora", f"LoRA adapter for {_name(checkpoint)}", _settings(checkpoint), use)
    (folder / CARD).write_text(text, encoding="utf-8")


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> bool:
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, folder / name)
    if "chat_template.jinja" in found and (source / _MORE_TEMPLATES).is_dir():
        shutil.copytree(source / _MORE_TEMPLATES, folder / _MORE_TEMPLATES, dirs_exist_ok=True)
    return bool(found)


def _card(
    checkpoint: Checkpoint, license_name: str | None, library: str, kind: str, title: str, text: str, use: list[str]
) -> str:
    data = ModelCardData(
        base_model=None if Path(checkpoint.base).exists() else checkpoint.base,
        license=license_name,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["lema", kind],
    )
    return "\n".join(["---", data.to_yaml(), "---", "", f"# {title}", "", text, "", "```python", *use, "```", ""])


def _name(checkpoint: Checkpoint) -> str:
    path = Path(checkpoint.base)
    return path.name if path.exists() else checkpoint.base


def _settings(checkpoint: Checkpoint) -> str:
    settings = checkpoint.settings
    kind = "DoRA" if settings.get("use_dora") else "rsLoRA" if settings.get("use_rslora") else "LoRA"
    return f"The adapter is {kind} of rank {settings.get('r')} and alpha {settings.get('lora_alpha')}."


def _license(card: Path) -> str | None:
    """The base's license, which its descendants keep; none where its card does not say."""
    if not card.is_file():
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None
