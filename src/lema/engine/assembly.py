"""From settings to the parts of an engine.

It knows which setting goes where; what to keep where it leaves to the plan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..config import LLAMA_TARGETS, LemaConfig
from ..errors import DeviceError
from ..machine.device import check_device, device_name, supports_bfloat16
from ..models.base import LemaModelAdapter
from ..models.locate import adapter_path
from ..models.lora import LoRAManager
from ..storage.index import GlobalBinaryIndex


class StoredModel(NamedTuple):
    """A model, and where its weights are."""

    adapter: LemaModelAdapter
    """Its family's code, without weights until they are bound."""
    gbi: GlobalBinaryIndex | None
    """None: not on this machine."""


def compute_dtype(config: LemaConfig) -> torch.dtype:
    """torch's type for `config.dtype`; `DeviceError` where the device cannot compute in it."""
    check_device(config.device)
    dtype: torch.dtype = getattr(torch, config.dtype)
    if dtype == torch.bfloat16 and not supports_bfloat16(config.device):
        raise DeviceError(f"{device_name(config.device)} has no bfloat16 arithmetic; choose dtype='float16'")
    return dtype


def lora_settings(config: LemaConfig, adapter: LemaModelAdapter) -> dict[str, Any]:
    """The config's LoRA settings as `LoRAManager` takes them."""
    if config.adapter_name_or_path is not None:
        folder = adapter_path(config.adapter_name_or_path)
        return {**LoRAManager.settings_from(folder), "dropout": config.lora_dropout}
    targets = config.lora_target_modules
    if targets == list(LLAMA_TARGETS) and adapter.default_target_modules is not None:
        targets = list(adapter.default_target_modules)
    return {
        "r": config.lora_rank,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target_modules": targets,
        "exclude_modules": config.exclude_modules,
    }


def assemble_lora(config: LemaConfig, adapter: LemaModelAdapter) -> LoRAManager | None:
    """The LoRA manager a config asks for; None where LoRA is off."""
    if not config.use_lora:
        return None
    return LoRAManager(lora_settings(config, adapter), device=config.device, seed=config.seed)
