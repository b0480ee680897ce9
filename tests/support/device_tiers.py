"""A device tier of a real accelerator over buffers of noise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lema.storage.layout import Move
from lema.storage.views import page_aligned
from lema.streaming.accelerator import AcceleratorBackend
from lema.streaming.device_tier import DeviceTier
from lema.streaming.schedule import AccessSchedule
from lema.streaming.slot_cache import Load, SlotCache
from lema.streaming.tiers import Tier


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


UNITS = 6


def tier_of(backend: AcceleratorBackend, pool: ThreadPoolExecutor, contents: list[torch.Tensor], pin: bool) -> Any:
    """Host cache, tier and host buffers; units are written into their host slots by the pool's threads."""
    slots = {unit: unit % 2 for unit in range(UNITS)}
    sizes = {unit: len(content) for unit, content in enumerate(contents)}
    buffers = [page_aligned(max(sizes.values())) for _ in range(2)]
    if pin and not all(backend.pin(buffer) for buffer in buffers):
        pytest.skip("pinning is refused here")
    moves = {unit: [Move(0, 0, size)] for unit, size in sizes.items()}
    plan = AccessSchedule.training(UNITS)

    def read(load: Load) -> None:
        buffers[load.slot].fill_(0xFF)
        buffers[load.slot][: sizes[load.unit]].copy_(contents[load.unit])
        host.finished(load)

    host = SlotCache(slots, plan.loads(slots), 2, lambda load: pool.submit(read, load))
    return SimpleNamespace(
        host=host, plan=plan, tier=DeviceTier(backend, Tier(host, buffers), slots, plan, 2, moves), buffers=buffers
    )
