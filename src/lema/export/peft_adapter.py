"""`export --to peft`: a clean adapter directory, with PEFT's two files, tokenizer and card, and nothing else.

Nothing of the base's weights is read.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..models.lora import ADAPTER_WEIGHTS
from ..prepare.single_file import parse_dtype
from .check import refuse_problems
from .checkpoint import Checkpoint
from .staging import staged
from .surroundings import copy_tokenizer, write_adapter_card


def export_peft(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write an adapter as PEFT and servers expect it: its settings, its tensors, what is needed to chat with it.

    Args:
        checkpoint: a directory with a PEFT adapter, such as training writes.
        output: the directory to make; appears complete or not at all.
        base: the name the adapter shall give its base model: best a hub id.
        dtype: of the tensors; None: as they are.

    Raises:
        CheckpointError, UnsupportedError: the adapter is damaged, or is not LoRA.
        ConfigError: the output exists, or nothing says what the base is.
    """
    source = Checkpoint.open(checkpoint, base)
    refuse_problems(source.folder)
    target = None if dtype is None else parse_dtype(dtype)
    config = source.lora_config()
    config.inference_mode, config.base_model_name_or_path = True, source.base
    config.task_type = config.task_type or "CAUSAL_LM"
    with source.tensors() as saved, staged(Path(output), {"adapter": str(source.folder.resolve())}) as staging:
        tensors = saved.load_tensors(saved.keys)
        if target is not None:
            tensors = {name: tensor.to(target) for name, tensor in tensors.items()}
        config.save_pretrained(str(staging.folder))
        save_file(tensors, staging.folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        copy_tokenizer(source.folder, staging.folder)
        write_adapter_card(source, staging.folder)
        return staging.publish()
