"""`export --to gguf-adapter`: a LoRA adapter as one GGUF file, for llama.cpp's `--lora`.

The base's weights are not needed: llama.cpp's names, its order of rows and its scaling follow from the settings.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; tensors and metadata as llama.cpp's
convert_lora_to_gguf.py writes them: `NAME.lora_a` `[r, in]`, `NAME.lora_b` `[out, r]`, and a scale of
`adapter.lora.alpha / r`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, UnsupportedError, WeightsError
from ..libraries import how_to_install
from ..storage.atomic import replaced_file
from ..storage.index import GlobalBinaryIndex
from .checkpoint import Checkpoint
from .lora_layers import Target, copies_of_base, find_targets

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "smollm3": "smollm3", "granite": "granite", "qwen2": "qwen2",
    "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
}  # fmt: skip
"""model_type of transformers -> architecture of llama.cpp, for families whose matrices map one to one."""
_PERMUTED = ("llama", "smollm3", "granite")
"""Architectures whose query and key rows llama.cpp keeps in the order of Meta's rotary embedding."""
_TYPES = {"float32": np.float32, "float16": np.float16}


def export_gguf(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
) -> Path:
    """Write an adapter as GGUF. Of the base only its configuration is read.

    Args:
        checkpoint: a directory with a PEFT adapter, such as training writes.
        output: the `.gguf` file to make; appears complete or not at all.
        base: the base model, where the checkpoint's own note is not right any more.
        dtype: "float32" or "float16".

    Raises:
        CheckpointError: the adapter is damaged or does not fit.
        UnsupportedError: DoRA, an architecture, or a module that llama.cpp's adapters cannot express.
        ConfigError: the output exists, or another dtype.
        WeightsError: the `gguf` package is not installed, or the disk refuses.
    """
    path = Path(output)
    if importlib.util.find_spec("gguf") is None:
        raise WeightsError(f"Writing GGUF needs the gguf package. Install it: {how_to_install('gguf')}.")
    if dtype not in _TYPES:
        raise ConfigError(f"dtype={dtype!r}: llama.cpp takes adapters in {' or '.join(_TYPES)}")
    if path.exists() or path.suffix != ".gguf":
        raise ConfigError(f"{path}: must be the name of a .gguf file that does not exist yet")
    source = Checkpoint.open(checkpoint, base)
    config = source.base_config()
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise UnsupportedError(
            f"{source.base} is of type {config['model_type']!r}; adapters are written for {', '.join(ARCHITECTURES)}. "
            "Merge the adapter and convert the whole model with llama.cpp's convert_hf_to_gguf.py instead"
        )
    _refuse(source)
    with source.tensors() as saved:
        if whole := [name for key, name in copies_of_base(saved).items() if ".base_layer." not in key]:
            raise UnsupportedError(f"{source.folder} holds {whole[0]} as a whole, which llama.cpp's adapters cannot")
        model = source.base_model()
        targets = find_targets(source, model, saved)
        tensors = _tensors(source, architecture, model.config, targets, saved)
        _write(path, architecture, tensors, _common_alpha(targets), _TYPES[dtype])
    return path


def _refuse(source: Checkpoint) -> None:
    if source.settings.get("use_dora"):
        raise UnsupportedError(f"{source.folder} is DoRA, which llama.cpp's adapters cannot express; merge it instead")
    if source.settings.get("target_parameters"):
        raise UnsupportedError(f"{source.folder} changes fused experts (target_parameters); merge it instead")


def _common_alpha(targets: dict[str, Target]) -> float:
    """The alpha most layers have in llama.cpp's sense, where the scale is alpha / r for rsLoRA too."""
    return Counter(target.scaling * target.rank for target in targets.values()).most_common(1)[0][0]


def _tensors(
    source: Checkpoint, architecture: str, config: Any, targets: dict[str, Target], saved: GlobalBinaryIndex
) -> dict[str, torch.Tensor]:
    """Tensors by llama.cpp's names, float32."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    alpha = _common_alpha(targets)
    tensors: dict[str, torch.Tensor] = {}
    for parameter, target in targets.items():
        name = names.get_name(parameter, try_suffixes=(".weight",))
        if name is None or not parameter.endswith(".weight"):
            raise UnsupportedError(
                f"{source.folder} changes {parameter}, which llama.cpp's {architecture} does not have"
            )
        if name == "output.weight" and config.tie_word_embeddings:
            raise UnsupportedError(f"{source.folder} changes {parameter}, which is tied; llama.cpp would ignore it")
        a, b = (saved.load_tensors([key])[key].float() for key in target.keys)
        leaf = parameter.split(".")[-2]
        if architecture in _PERMUTED and leaf in ("q_proj", "k_proj"):
            b = _permuted(b, config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads)
        scale = target.scaling / (alpha / target.rank)
        tensors[f"{name}.lora_a"] = a
        tensors[f"{name}.lora_b"] = b if math.isclose(scale, 1.0, rel_tol=1e-12) else b * scale
    return tensors


def _permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `[heads * size, r]` in llama.cpp's order: the two halves of a head interleaved."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _write(path: Path, architecture: str, tensors: dict[str, torch.Tensor], alpha: float, kind: Any) -> None:
    from gguf import GGUFType, GGUFWriter, Keys, LlamaFileType

    try:
        with replaced_file(path, durable=True) as aside:
            writer = GGUFWriter(aside, architecture)
            writer.add_type(GGUFType.ADAPTER)
            writer.add_string(Keys.Adapter.TYPE, "lora")
            writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
            writer.add_file_type(LlamaFileType.ALL_F32 if kind is np.float32 else LlamaFileType.MOSTLY_F16)
            for name, tensor in tensors.items():
                writer.add_tensor(name, tensor.contiguous().numpy().astype(kind))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise WeightsError(f"{path}: writing failed: {error.strerror}. Check the disk and its permissions.") from error
