"""An engine by a given plan on the virtual device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers import (
    Gradients,
    Recorder,
    lema_config,
    randomise,
    recorded,
)
from lema import LemaTrainer
from lema.models import get_adapter
from lema.models.lora import LoRAManager
from lema.planning.plan import MemoryPlan
from lema.storage.index import GlobalBinaryIndex
from lema.streaming.accelerator import AcceleratorBackend
from lema.streaming.weight_store import WeightStore
from spreads import batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine:
    """The low-level parts put together over the device and a plan; a context that closes them."""

    def __init__(self, folder: Path, plan: MemoryPlan, device: str, stepping: bool = False, **settings: Any) -> None:
        self.config = lema_config(folder, device=device, **settings)
        config = json.loads((folder / "config.json").read_text())
        adapter = get_adapter(config["model_type"], config)
        adapter.configure(DTYPES[self.config.dtype], self.config.attn_implementation)
        gbi = GlobalBinaryIndex(folder)
        plan = replace(plan, device=device)
        self.memory = WeightStore(
            gbi, adapter, device=device, plan=plan, backend=AcceleratorBackend(device), poison=True
        )
        lora = {"r": 4, "alpha": 8, "target_modules": "all-linear", "dropout": self.config.lora_dropout}
        self.lora = LoRAManager(lora, device=device, seed=7)
        self.lora.attach(adapter)
        optimizer = None if stepping else Recorder(self.lora.get_trainable_parameters())
        self.trainer = LemaTrainer(self.config, adapter, gbi, self.lora, optimizer, self.memory)

    def adopt(self, plain: torch.nn.Module) -> None:
        """Take a plain model's adapter."""
        randomise(plain, self.trainer.model)
        if self.trainer.trainables.masters is not None:
            self.trainer.trainables.masters.copy_from_model()

    def step(self, seed: int) -> tuple[float, Gradients]:
        torch.manual_seed(seed)
        _, loss = self.trainer.train_step(batch())
        assert loss is not None
        found = recorded(self.trainer, self.trainer.model)
        return loss, {name: gradient.cpu() for name, gradient in found.items()}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.close()
