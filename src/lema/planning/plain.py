"""The plan of a run without a budget: the strategy's own, found without looking into the model.

It knows what there is to be kept and a strategy; it knows no workload and no machine.
"""

from __future__ import annotations

from typing import Protocol

from ..config import MemoryStrategy
from ..storage.index import GlobalBinaryIndex
from ..storage.layout import ParameterSource, SlotLayout
from .plan import MemoryPlan


class Stored(Protocol):
    """A model as its files hold it."""

    packs_units: bool

    def unit_sources(self, gbi: GlobalBinaryIndex) -> list[list[ParameterSource]]: ...
    def head_source(self, gbi: GlobalBinaryIndex) -> ParameterSource | None: ...


def plan_without_budget(
    gbi: GlobalBinaryIndex,
    model: Stored,
    *,
    device: str,
    strategy: MemoryStrategy,
    host_slots: int,
    device_slots: int,
) -> MemoryPlan:
    """What is kept where if nobody counts bytes: nothing is searched, measured or predicted.

    STREAMING passes all units through slots. RESIDENT keeps all in RAM: beside a device that is pinned, and on the CPU
    it is the mapped files themselves.

    Args:
        device: kind of the device that computes, 'cpu' among them.

    Returns:
        A plan that says nothing of batches: no rows are expected, and micro-batches are as large as they come.
    """
    units = model.unit_sources(gbi)
    everything, on_cpu, resident = tuple(range(len(units))), device == "cpu", strategy is MemoryStrategy.RESIDENT
    head = model.head_source(gbi) if on_cpu and not resident else None
    reads = (SlotLayout(unit, model.packs_units).read_bytes for unit in units)
    head_streams = head is not None and head_should_stream(head.nbytes, 2 * sum(reads))
    return MemoryPlan(
        device=device, on_device=(), in_ram=everything if resident and not on_cpu else (),
        from_disk=() if resident else everything, keep_activations=(), host_slots=host_slots,
        device_slots=device_slots, batch=0, seq=0, micro_batch_size=0, loss_chunk_size=None,
        loss_by_batch=True, head="streamed" if head_streams else "mapped", head_rows=0,
        boundaries="device", optimizer="device",
    )  # fmt: skip


def head_should_stream(head_bytes: int, step_bytes: int) -> bool:
    """Whether to read the head anew at every step instead of leaving it mapped.

    Where memory is short a mapped head is read again through page faults; where the head is a large part
    of the model, reading it on purpose costs more than it saves. So: from 32 MiB on, if it adds at most a
    sixteenth to the bytes a step reads.
    """
    return head_bytes >= 32 << 20 and head_bytes * 16 <= step_bytes
