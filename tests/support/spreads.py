"""Plans that spread a model's layers over the tiers, and an engine that keeps to one on the simulated device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lema
from helpers import Recorder, lema_config
from lema.models import get_adapter
from lema.models.lora import LoRAManager
from lema.planning.plan import MemoryPlan
from lema.storage.index import GlobalBinaryIndex
from lema.streaming.weight_store import WeightStore
from simulated import SimulatedDevice

LAYERS = 6
PLAIN = MemoryPlan(
    device="cuda", on_device=(), in_ram=(), from_disk=tuple(range(LAYERS)), keep_activations=(), host_slots=2,
    device_slots=2, batch=3, seq=10, micro_batch_size=3, loss_chunk_size=None, head="resident", head_rows=99,
    boundaries="device", optimizer="device",
)  # fmt: skip


def spread(on_device: tuple[int, ...] = (), in_ram: tuple[int, ...] = (), **changes: Any) -> MemoryPlan:
    left = tuple(unit for unit in range(LAYERS) if unit not in {*on_device, *in_ram})
    return replace(PLAIN, on_device=on_device, in_ram=in_ram, from_disk=left, **changes)


PLANS = {
    "all from disk": spread(),
    "all in RAM": spread(in_ram=tuple(range(LAYERS))),
    "all on the device": spread(on_device=tuple(range(LAYERS)), keep_activations=tuple(range(LAYERS))),
    "all three tiers": spread(on_device=(1, 5), in_ram=(0, 3)),
    "every second on the device": spread(on_device=(1, 3, 5)),
    "boundaries on the host": spread(on_device=(5,), boundaries="host"),
    "boundaries on the host, graphs kept": spread(on_device=(2, 5), boundaries="host", keep_activations=(2, 4, 5)),
    "optimizer on the host": spread(in_ram=(2,), optimizer="host"),
    "everything": spread(
        on_device=(3,), in_ram=(0, 5), boundaries="host", optimizer="host", keep_activations=(3, 5), device_slots=3,
        host_slots=3,
    ),
}  # fmt: skip


class Engine:
    """The low-level parts put together over a simulated device."""

    def __init__(self, folder: Path, plan: MemoryPlan, device: SimulatedDevice | None = None, **settings: Any) -> None:
        import json

        self.device = device or SimulatedDevice(seed=len(plan.in_ram), longest_pause=0.001)
        adapter = get_adapter("llama", json.loads((folder / "config.json").read_text()))
        adapter.configure(torch.float32, "eager")
        self.memory = WeightStore(
            GlobalBinaryIndex(folder), adapter, device="cpu", plan=plan, backend=self.device, poison=True
        )
        self.lora = LoRAManager(
            {"r": 4, "alpha": 8, "target_modules": "all-linear", "dropout": settings.pop("dropout", 0.0)},
            device="cpu", seed=7,
        )  # fmt: skip
        self.lora.attach(adapter)
        self.trainer = lema.LemaTrainer(
            lema_config(folder, **settings), adapter, self.memory.gbi, self.lora,
            Recorder(self.lora.get_trainable_parameters()), self.memory,
        )  # fmt: skip

    def close(self) -> None:
        self.memory.close()
        self.device.close()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (3, 10), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "labels": ids}
