"""`TripleBufferManager`: the weight store as the original's users make it, with a strategy in place of a plan."""

from __future__ import annotations

from abc import ABC
from typing import Any

from ..config import MemoryStrategy
from ..planning.plain import plan_without_budget, stored_bytes
from ..storage.index import GlobalBinaryIndex
from ..streaming.layer_state import StreamableModel
from ..streaming.weight_store import WeightStore

__all__ = ["TripleBufferManager"]


class TripleBufferManager(ABC):  # noqa: B024
    """The original's name of every `WeightStore`; calling it makes one.

    Args:
        gbi: the index of the weights.
        adapter: the model.
        device: 'cpu' computes in host slots.
        strategy: STREAMING, or RESIDENT: everything stays in RAM.
        num_slots: host slots, 2 or more.
        **options: those of `WeightStore`.
    """

    def __new__(  # type: ignore[misc]
        cls, gbi: GlobalBinaryIndex, adapter: StreamableModel, device: str = "cuda",
        strategy: MemoryStrategy | str = MemoryStrategy.STREAMING, *, num_slots: int = 2, **options: Any,
    ) -> WeightStore:  # fmt: skip
        kind = "cpu" if options.get("backend") is None else device.partition(":")[0]
        plan = plan_without_budget(
            *stored_bytes(gbi, adapter), device=kind, strategy=MemoryStrategy.parse(strategy), host_slots=num_slots
        )
        return WeightStore(gbi, adapter, plan, device, **options)


TripleBufferManager.register(WeightStore)
