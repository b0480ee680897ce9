"""`TripleBufferManager`, the weight store as the original's users call it: with a strategy where there is no plan.

What such a call leaves open is decided here and nowhere else.
"""

from __future__ import annotations

from ..config import MemoryStrategy
from ..planning.plan import MemoryPlan
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import SlotLayout
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
        kind = "cpu" if backend is None else device
        super().__init__(
            gbi,
            adapter,
            plan or plan_of_strategy(gbi, adapter, self.strategy, kind, num_slots, device_slots),
            device,
            num_readers=num_readers,
            prefetch_depth=prefetch_depth,
            backend=backend,
            floor=floor,
            direct_io=direct_io,
            poison=poison,
        )
        self.plan = plan


def plan_of_strategy(
    gbi: GlobalBinaryIndex,
    adapter: StreamableModel,
    strategy: MemoryStrategy,
    device: str,
    host_slots: int,
    device_slots: int,
) -> MemoryPlan:
    """Where weights are if nobody counts bytes; what the plan says of batches and of the optimizer means nothing."""
    sources, on_cpu = adapter.unit_sources(gbi), device == "cpu"
    units = tuple(range(len(sources)))
    resident = strategy is MemoryStrategy.RESIDENT
    source = adapter.head_source(gbi) if on_cpu and not resident else None
    reads = (SlotLayout(unit, adapter.packs_units).read_bytes for unit in sources)
    streams = source is not None and head_should_stream(source.nbytes, 2 * sum(reads))
    return MemoryPlan(
        device=device, on_device=(), in_ram=units if resident and not on_cpu else (),
        from_disk=() if resident else units, keep_activations=(), host_slots=host_slots, device_slots=device_slots,
        batch=0, seq=0, micro_batch_size=0, loss_chunk_size=None, head="streamed" if streams else "mapped",
        head_rows=0, boundaries="device", optimizer="device",
    )  # fmt: skip


def head_should_stream(head_bytes: int, step_bytes: int) -> bool:
    """Whether to read the head anew at every step instead of leaving it mapped.

    Where memory is short a mapped head is read again through page faults; where the head is a large part
    of the model, reading it on purpose costs more than it saves. So: from 32 MiB on, if it adds at most a
    sixteenth to the bytes a step reads.
    """
    return head_bytes >= 32 << 20 and head_bytes * 16 <= step_bytes
