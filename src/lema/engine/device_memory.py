"""Out of device memory: what torch says of it, made into what was planned, what was taken and what to set.

It knows a plan's parts and a device's counters; it knows nothing of what was being computed.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch

from ..errors import DeviceError, DeviceMemoryError
from ..machine.device import context_bytes, device_memory
from ..machine.memory import format_bytes
from ..planning.footprint import DEVICE_CONTEXT
from ..planning.plan import MemoryPlan


@contextlib.contextmanager
def explained(device: str, plan: MemoryPlan) -> Iterator[None]:
    """Inside the block torch's OutOfMemoryError becomes a `DeviceMemoryError`; what the failed work held is let go.

    Args:
        plan: what is allocated by.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        taken = _taken(device, plan)  # before the failed work's tensors go
        traceback.clear_frames(error.__traceback__)
        said = str(error).partition("\n")[0].rstrip(".")
        raise DeviceMemoryError(f"{device} is out of memory: {said}. {taken}. {_advice(plan)}") from error


def _taken(device: str, plan: MemoryPlan) -> str:
    """What was planned beside what there is."""
    planned = "Nothing was planned, as no budget was given"
    if plan.device_bytes:
        parts = sorted(plan.device_bytes.items(), key=lambda part: -part[1])
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
        planned = f"Planned were {format_bytes(plan.device_peak)} ({listed})"
    try:
        memory = device_memory(device)
    except DeviceError:  # it does not count: the plan's figures are what there is
        return planned
    others = memory.total - memory.free - memory.reserved - context_bytes(torch.device(device).type)
    beside = f", {format_bytes(others)} are taken by others" if others > 0 else ""
    return (
        f"{planned}; in use are {format_bytes(memory.allocated)}, reserved {format_bytes(memory.reserved)}"
        f"{beside}, free {format_bytes(memory.free)} of {format_bytes(memory.total)}"
    )


def _advice(plan: MemoryPlan) -> str:
    """The setting that lowers the plan's largest part."""
    if not plan.device_bytes:
        return "Set vram_budget ('auto', or a size as in '6GB'), and what fits is planned"
    parts = {name: size for name, size in plan.device_bytes.items() if name not in (DEVICE_CONTEXT, "overhead")}
    largest = max(parts, key=lambda name: parts[name])
    setting = {
        "activations": _smaller_step(plan),
        "boundaries": "boundaries to 'host'" if plan.boundaries == "device" else f"max_seq_length below {plan.seq}",
        "adapters": "optimizer_place to 'host'" if plan.optimizer == "device" else "lora_rank lower",
        "rest of the model": "head to 'chunked'" if plan.head == "resident" else "",
        "slots": f"vram_buffer_size below {plan.device_slots}" if plan.device_slots > 2 else "",
        "layers kept on the device": f"device_layers below {len(plan.on_device)}",
    }[largest]
    return (
        f"The largest part is {largest}: set {f'{setting}, or ' if setting else ''}vram_budget below "
        f"{format_bytes(plan.device_peak)}, or end what else uses the device"
    )


def _smaller_step(plan: MemoryPlan) -> str:
    if plan.loss_bytes * 2 > plan.device_bytes["activations"]:
        return f"loss_chunk_size below {plan.loss_chunk_size or plan.batch * plan.seq}"
    if plan.micro_batch_size > 1:
        return f"micro_batch_size below {plan.micro_batch_size}"
    if plan.keep_activations:
        return f"keep_activations below {len(plan.keep_activations)}"
    return f"max_seq_length below {plan.seq}"
