"""How long a step takes under a memory plan, from measured rates.

It knows bytes, operations and rates as numbers; it knows nothing of which plan is better.
"""

from __future__ import annotations

from dataclasses import replace

from .footprint import Footprint
from .hardware import Hardware
from .plan import IDLE_HEAP, Estimate, MemoryPlan

_FEW_ROWS = 16
"""Rows at which half of a matmul's time goes into reading its weight; an order of magnitude, to rank plans."""
CPU_EFFICIENCY = 0.6
"""Share of a large matmul's rate that whole layers reach on a CPU. Measured at six budgets of a 1.7B shape in bf16 on
two cores: 0.55 to 0.62; see docs/benchmarks, dial."""
_OPTIMIZER_BYTES, _HOST_BYTES_PER_S = 28, 10e9
"""Bytes Adam reads and writes for a parameter in float32, and the rate at which a host does so, roughly."""

_FAULT_BYTES_PER_S = 1.2e9
"""Rate at which kept activations get their pages anew where a heap gives back what is freed. Measured on a 1.7B shape
in bf16 with every activation kept: 1.5 to 3 s for 2.5 GB."""


def counted(
    plan: MemoryPlan, footprint: Footprint, hardware: Hardware, dtype: str, idle_heap: int = 0
) -> MemoryPlan:  # fmt: skip
    """The plan with the bytes and seconds predicted for it.

    Args:
        dtype: what is computed with, for the rate.
        idle_heap: host bytes left to a heap that keeps what is freed.
    """
    host = footprint.host(plan) | ({IDLE_HEAP: idle_heap} if idle_heap else {})
    plan = replace(
        plan, transient=footprint.transient(plan), loss_bytes=footprint.loss_peak(plan), host_bytes=host,
        device_bytes=footprint.on_device(plan),
    )  # fmt: skip
    return replace(plan, estimate=estimate(plan, footprint, hardware, dtype))


def estimate(plan: MemoryPlan, footprint: Footprint, hardware: Hardware, dtype: str) -> Estimate:
    """Seconds of a step under a plan: each phase takes as long as the slowest of computing, reading and copying.

    `step = sum over forward, head, backward of max(compute, disk, link)`; docs/ARCHITECTURE.md, "The plan".

    Args:
        dtype: what is computed with, for the rate.
    """
    sizes, work, on_cpu = footprint.sizes, footprint.workload, footprint.on_cpu
    rate = hardware.flops_for(dtype) * (CPU_EFFICIENCY if on_cpu else 1.0)
    n = len(sizes.units)
    recomputed = n - len(plan.keep_activations)
    total, seq = work.batch * work.seq, work.seq
    # few rows at once leave a matmul waiting for its weight
    parts = [(count * (1 + _FEW_ROWS / (rows * seq)), footprint.layer(rows)) for count, rows in footprint.cuts(plan)]
    forward = n * sum(count * layer.forward_flops for count, layer in parts) / rate
    backward = n * sum(count * layer.backward_flops for count, layer in parts) / rate + forward * recomputed / n
    decoding = sum(sizes.decoded) / sizes.decode_bytes_per_s  # in the forward, and again for the recomputation
    forward, backward = forward + decoding, backward + decoding
    if on_cpu and plan.keep_activations and not plan.keeps_idle_heap:
        forward += footprint.kept_graphs(plan) / _FAULT_BYTES_PER_S
    positions = footprint.loss_positions(plan)
    head = work.loss(positions).flops * (total / positions) / rate * (1 + _FEW_ROWS / positions)
    shared = plan.streamed_to_compute
    slots = plan.host_slots if on_cpu else plan.device_slots
    # in the steady state the units last in the slots at a turn are found there
    passing = max(1 - slots / len(shared), 0.0) if shared else 0.0
    disk = sum(sizes.units[u] for u in plan.from_disk) * passing / hardware.disk_bytes_per_s
    comes_and_goes = plan.head in ("streamed", "chunked")
    disk_head = (sizes.head if comes_and_goes and not plan.head_in_ram else 0) / hardware.disk_bytes_per_s
    at_loss = plan.head == "chunked"  # two slots hold little of it: the rest is read, and crosses, during the loss
    link = link_head = optimizer = 0.0
    if not on_cpu:
        carried = sum(sizes.units[u] for u in shared) * passing
        carried += recomputed * work.boundary if plan.boundaries == "host" else 0
        link = carried / hardware.link_bytes_per_s
        link_head = sizes.head / hardware.link_bytes_per_s if at_loss else 0.0
        if plan.optimizer == "host":
            optimizer = sizes.lora * (_OPTIMIZER_BYTES / _HOST_BYTES_PER_S + 8 / hardware.link_bytes_per_s)
    phases = [
        {"compute": forward, "disk": disk + (0.0 if at_loss else disk_head), "link": link},
        {"compute": head, "disk": disk_head if at_loss else 0.0, "link": link_head},
        {"compute": backward, "disk": disk, "link": link},
        {"compute": optimizer},
    ]
    step = sum(max(phase.values()) for phase in phases)
    bound: dict[str, float] = {}
    for phase in phases:
        longest = max(phase, key=lambda name: phase[name])
        bound[longest] = bound.get(longest, 0.0) + phase[longest]
    slowest = max(bound, key=lambda name: bound[name])
    if slowest == "compute" and 2 * decoding > (forward + head + optimizer + backward) / 2:
        slowest = "decoding"
    return Estimate(
        step_seconds=step,
        compute_seconds=forward + head + optimizer + backward,
        disk_seconds=2 * disk + disk_head,
        link_seconds=2 * link + link_head,
        tokens_per_second=total / step if step else 0.0,
        bound_by=slowest,
        decode_seconds=2 * decoding,
    )
