"""The plan of a run without a budget: the strategy's own, found without looking into the model.

It knows what there is to be kept and a strategy; it knows no workload and no machine.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def stored_bytes(gbi: GlobalBinaryIndex, model: Stored) -> tuple[list[int], int]:
    """Bytes that are read for each unit, and for a head that can stream; 0: it cannot."""
    head = model.head_source(gbi)
    units = [SlotLayout(unit, model.packs_units).read_bytes for unit in model.unit_sources(gbi)]
    return units, 0 if head is None else head.nbytes


def plan_without_budget(
    units: Sequence[int], head: int, *, device: str, strategy: MemoryStrategy, host_slots: int = 2,
    device_slots: int = 2, codes: bool = False,
) -> MemoryPlan:  # fmt: skip
    """What is kept where if nobody counts bytes: nothing is searched, measured or predicted.

    STREAMING passes all units through slots. RESIDENT keeps all in RAM: beside a device that is pinned, and on the CPU
    it is the mapped files themselves, unless those hold codes, which stay in slots.

    Args:
        units, head: as `stored_bytes` has them.
        device: kind of the device that computes, 'cpu' among them.
        codes: layers are decoded at every use.

    Returns:
        A plan that says nothing of steps: no rows are expected, and micro-batches are as large as they come.
    """
    everything, on_cpu, resident = tuple(range(len(units))), device == "cpu", strategy is MemoryStrategy.RESIDENT
    mapped = resident and on_cpu and not codes
    head_streams = on_cpu and not resident and head > 0 and head_should_stream(head, 2 * sum(units))
    return MemoryPlan(
        device=device, on_device=(), in_ram=everything if resident and not mapped else (),
        from_disk=() if resident else everything, mapped=everything if mapped else (), keep_activations=(),
        host_slots=host_slots, device_slots=device_slots, batch=0, seq=0, micro_batch_size=0, whole_batch=True,
        loss_chunk_size="auto", head="streamed" if head_streams else "mapped", head_rows=0, boundaries="device",
        optimizer="device",
    )  # fmt: skip


def head_should_stream(head_bytes: int, step_bytes: int) -> bool:
    """Whether to read the head anew at every step instead of leaving it mapped.

    Where memory is short a mapped head is read again through page faults; where the head is a large part
    of the model, reading it on purpose costs more than it saves. So: from 32 MiB on, if it adds at most a
    sixteenth to the bytes a step reads.
    """
    return head_bytes >= 32 << 20 and head_bytes * 16 <= step_bytes
