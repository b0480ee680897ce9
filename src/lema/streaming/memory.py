"""`TripleBufferManager`, the weight store as the original's users call it: with a strategy where there is no plan.

What such a call leaves open is the plan without a budget.
"""

from __future__ import annotations

from ..config import MemoryStrategy
from ..planning.plain import plan_without_budget
from ..planning.plan import MemoryPlan
from ..storage.index import GlobalBinaryIndex
from .backend import DeviceBackend
from .layer_state import StreamableModel
from .weight_store import MemoryStats, WeightStore

__all__ = ["MemoryStats", "TripleBufferManager"]


class TripleBufferManager(WeightStore):
    """A weight store for a plan, or for a strategy; see `WeightStore` for what is not said here.

    Args:
        strategy: without a plan; RESIDENT binds everything to the mapped files on CPU and streams nothing, and keeps
            everything in RAM where there is a device.
        num_slots: host slots without a plan, 2 or more.
        device_slots: slots on the device without a plan, 2 or more.
        plan: has the say where there is one.
    """

    def __init__(
        self,
        gbi: GlobalBinaryIndex,
        adapter: StreamableModel,
        device: str = "cuda",
        strategy: MemoryStrategy | str = MemoryStrategy.STREAMING,
        *,
        num_slots: int = 2,
        num_readers: int = 2,
        prefetch_depth: int | None = None,
        plan: MemoryPlan | None = None,
        backend: DeviceBackend | None = None,
        device_slots: int = 2,
        floor: int | None = None,
        direct_io: bool | None = None,
        poison: bool = False,
    ) -> None:
        self.strategy = MemoryStrategy.parse(strategy)
        plan = plan or plan_without_budget(
            gbi, adapter, device="cpu" if backend is None else device, strategy=self.strategy, host_slots=num_slots,
            device_slots=device_slots,
        )  # fmt: skip
        super().__init__(
            gbi,
            adapter,
            plan,
            device,
            num_readers=num_readers,
            prefetch_depth=prefetch_depth,
            backend=backend,
            floor=floor,
            direct_io=direct_io,
            poison=poison,
        )
