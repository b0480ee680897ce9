"""From a configuration to the parts of an engine.

It knows which setting goes where; it decides nothing itself.
"""

from __future__ import annotations

import torch

from ..config import LLAMA_TARGETS, LemaConfig
from ..core.gbi import GlobalBinaryIndex
from ..core.lora import LoRAManager
from ..core.memory import TripleBufferManager, check_device
from ..errors import DeviceError
from ..models.base import LemaModelAdapter


def compute_dtype(config: LemaConfig) -> torch.dtype:
    """torch's type for `config.dtype`; `DeviceError` where the device cannot compute in it."""
    check_device(config.device)
    dtype: torch.dtype = getattr(torch, config.dtype)
    if dtype == torch.bfloat16 and torch.device(config.device).type == "cuda":
        major, _ = torch.cuda.get_device_capability(config.device)
        if major < 8:
            raise DeviceError(
                f"{torch.cuda.get_device_name(config.device)} has no bfloat16 arithmetic; choose dtype='float16'"
            )
    return dtype


def assemble_memory(config: LemaConfig, adapter: LemaModelAdapter, gbi: GlobalBinaryIndex) -> TripleBufferManager:
    """The memory manager a config asks for."""
    adapter.configure(compute_dtype(config), config.attn_implementation)
    return TripleBufferManager(
        gbi,
        adapter,
        device=config.device,
        strategy=config.strategy,
        num_slots=config.slots,
        num_readers=config.num_readers,
        prefetch_depth=config.prefetch_depth,
    )


def assemble_lora(config: LemaConfig, adapter: LemaModelAdapter) -> LoRAManager | None:
    """The LoRA manager a config asks for; None where LoRA is off."""
    if not config.use_lora:
        return None
    targets = config.lora_target_modules
    if targets == list(LLAMA_TARGETS) and adapter.default_target_modules is not None:
        targets = list(adapter.default_target_modules)
    settings = {
        "r": config.lora_rank,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target_modules": targets,
    }
    return LoRAManager(settings, device=config.device, seed=config.seed)
