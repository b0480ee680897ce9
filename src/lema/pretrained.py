"""`lema.from_pretrained`: a model of transformers whose layers stream, for trainers and adapters of other libraries.

It knows settings and what is promised to callers; how a model is opened and held is the engine's.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .config import LemaConfig, MemorySettings, ModelSettings
from .engine.opening import open_streamed
from .errors import ConfigError, UnsupportedError
from .machine.choices import DTYPES
from .models.locate import adapter_for, local_path
from .models.transformers_adapter import TransformersAdapter
from .typed import PLANNED, close_to, fields_with

_OWNER = "lema_attachment"
_STEP = ("batch_size", "max_seq_length", "micro_batch_size", "seed")
_DECIDED = {
    "head": "trainers read the head's weight themselves, so it stays in memory whole",
    "quantize": "make codes first with lema prepare --quantize, and open what that writes",
}


def from_pretrained(
    name_or_path: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", device: str = "auto",
    ram_budget: int | str | None = None, vram_budget: int | str | None = None, lora_rank: int | None = 16,
    lora_target_modules: list[str] | str = "all-linear", **settings: Any,
) -> PreTrainedModel:  # fmt: skip
    """transformers' own model, in evaluation mode, frozen and without adapters, whose layers stream whoever calls it.

    Hand it to `peft.get_peft_model`, to transformers' `Trainer` or to TRL's trainers. Adapters come after the plan is
    made, so a budget counts what is said of them and of a step here. Losses are taken by whoever trains, from all
    logits at once: these are counted, and so is a head that stays whole.

    Reading threads and files are given back by `lema.close(model)`, else when the model is garbage collected.

    Args:
        name_or_path: a directory with config.json and safetensors, or a hub id.
        dtype: compute type of the base; 'auto': the one that config.json names.
        device: as `LemaConfig` takes it; 'auto': the accelerator that is there, else the CPU.
        ram_budget, vram_budget: bytes, '3GB' or 'auto'; None: the smallest footprint that costs no time.
        lora_rank: rank of the adapters that a budget counts; None: nothing will be trained.
        lora_target_modules: modules they will be on.
        **settings: `batch_size`, `micro_batch_size` and `max_seq_length` of a step, which a budget counts, and
            `LemaConfig`'s settings of the model and of memory.

    Returns:
        The model; `type(model)` is its family's class in transformers.

    Raises:
        ConfigError: a setting that is unknown or has no meaning here, or a budget that nothing fits in.
        WeightsError, UnsupportedError, DeviceError: as `LemaModel` says.
    """
    known = [field.name for kind in (ModelSettings, MemorySettings) for field in fields(kind)] + list(_STEP)
    for name in settings:
        if name in _DECIDED:
            raise ConfigError(f"{name} cannot be set for from_pretrained: {_DECIDED[name]}")
        if name not in known:
            hint = close_to(name, known) or "; it takes " + ", ".join(known)
            raise ConfigError(f"from_pretrained has no setting {name!r}{hint}. Trainers and adapters have their own")
    config = LemaConfig(
        os.fspath(name_or_path), device=device, dtype="float32" if dtype == "auto" else str(dtype),
        ram_budget=ram_budget, vram_budget=vram_budget, use_lora=lora_rank is not None, lora_rank=lora_rank or 16,
        lora_target_modules=lora_target_modules, loss_chunk_size=None, **settings,
    )  # fmt: skip
    adapter = adapter_for(config, local_path(config.model_name_or_path, "*.json"))
    if not isinstance(adapter, TransformersAdapter):
        raise UnsupportedError(f"{type(adapter).__name__} is no model of transformers: open it as lema.LemaModel")
    stored = str(adapter.dtype).removeprefix("torch.")
    if dtype == "auto" and stored in DTYPES:
        config = config.replace(dtype=stored)
    if any(getattr(config, name) is not None for name in fields_with(LemaConfig, PLANNED)):
        config = config.replace(head="resident")
    attachment = open_streamed(config, adapter, whole_head=True).attachment
    model = adapter.model
    model.__dict__[_OWNER] = attachment
    return model.eval()


def close(model: nn.Module) -> None:
    """End the reading threads of a model of `from_pretrained` and give its files back; its adapters stay as they are.

    Args:
        model: the model, or whatever was put around it.

    Raises:
        ConfigError: it streams nothing.
    """
    found = [part.__dict__[_OWNER] for part in model.modules() if _OWNER in part.__dict__]
    if not found:
        raise ConfigError(f"{type(model).__name__} was not opened by lema.from_pretrained: there is nothing to close")
    for attachment in found:
        attachment.close()
