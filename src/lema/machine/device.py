"""Devices that layers are computed on: the CPU, or whichever accelerator this torch has; what they are and have.

It knows `torch.accelerator` and the modules torch keeps for kinds of devices; what only CUDA has it asks of
`cuda`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DeviceError
from . import cuda
from .choices import DTYPES
from .choices import default_device as default_device

_NEEDED = ("get_rng_state", "set_rng_state")
"""Of a device's module: without them dropout could not be computed twice alike."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device's memory now."""

    total: int
    """0 on the CPU, which has RAM only."""
    free: int
    """To anyone: what torch holds unused is not among it."""
    reserved: int
    """Held by this process's torch, in use or not."""
    allocated: int
    """Of `reserved`, in use."""

    @property
    def available(self) -> int:
        """What this process could still allocate."""
        return self.free + self.reserved - self.allocated


def check_device(device: str | torch.device) -> None:
    """Raise `DeviceError` unless layers can be computed on this device, before anything is started on it."""
    place = _place(device)
    if place.type == "cpu":
        return
    module = accelerator_module(place)
    if lacking := [name for name in _NEEDED if not hasattr(module, name)]:
        raise DeviceError(
            f"device={str(device)!r}: torch.{place.type} has no {' and no '.join(lacking)}, so dropout could not be "
            "computed twice alike. Use a version of it that has, or device='cpu'"
        )
    peak_memory(place)


def accelerator_module(device: torch.device) -> Any:
    """torch's module for a kind of device that is there (`torch.xpu` and the like); `DeviceError` otherwise."""
    found = _accelerator()
    if found is None or found.type != device.type:
        raise DeviceError(
            f"device={str(device)!r} was asked for, but this torch ({torch.__version__}) sees "
            f"{found.type if found else 'no accelerator'}. Install a torch build for your accelerator and driver, or "
            f"choose {f'device={found.type!r} or ' if found else ''}device='cpu'"
        )
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise DeviceError(f"device={str(device)!r} is not there: torch sees {torch.accelerator.device_count()} of them")
    return torch.get_device_module(device)


def device_name(device: str | torch.device) -> str:
    """The card's name; where torch does not know one, and on the CPU, the kind of the device."""
    place = torch.device(device)
    if place.type == "cpu":
        return place.type
    module = accelerator_module(place)
    if hasattr(module, "get_device_name"):
        return str(module.get_device_name(place))
    properties = getattr(module, "get_device_properties", None)
    return str(getattr(properties(place), "name", place.type)) if properties is not None else place.type


def supports_bfloat16(device: str | torch.device) -> bool:
    """Whether the device has bf16 arithmetic: of CUDA's some cards, of others each."""
    place = torch.device(device)
    return place.type != "cuda" or cuda.has_bfloat16(place)


def compute_dtypes(device: str | torch.device) -> tuple[str, ...]:
    """Types the device computes in without emulating them, by name."""
    return tuple(dtype for dtype in DTYPES if dtype != "bfloat16" or supports_bfloat16(device))


def context_bytes(kind: str) -> int:
    """Device bytes a process takes before its first tensor, which no counter of torch's has; of a kind of device."""
    return cuda.CONTEXT_BYTES if kind == "cuda" else 0


# -- memory --------------------------------------------------------------------------------------


def device_memory(device: str | torch.device) -> DeviceMemory:
    """Counters of a device and of torch's allocator on it; all 0 on the CPU.

    An allocator that does not count is taken to hold nothing.

    Raises:
        DeviceError: the device is not there, or does not say how much of it is free.
    """
    place = torch.device(device)
    if place.type == "cpu":
        return DeviceMemory(0, 0, 0, 0)
    info = _ask(place, "get_memory_info", "mem_get_info")
    if info is None:
        raise DeviceError(
            f"device={str(device)!r} does not say how much memory is free: neither torch.accelerator.get_memory_info "
            f"nor torch.{place.type}.mem_get_info answers. Set vram_budget to a size, as in '6GB'"
        )
    counted = [_ask(place, name) for name in ("memory_reserved", "memory_allocated")]
    reserved, allocated = (0, 0) if None in counted else counted
    return DeviceMemory(int(info[1]), int(info[0]), int(reserved), int(allocated))


def total_device_memory(device: str | torch.device) -> int:
    """Bytes of memory an accelerator has; 0 on the CPU.

    Raises:
        DeviceError: the device is not there, or does not say.
    """
    place = torch.device(device)
    if place.type == "cpu":
        return 0
    if (info := _ask(place, "get_memory_info", "mem_get_info")) is not None:
        return int(info[1])
    total = getattr(_ask(place, "get_device_properties"), "total_memory", None)
    if total is None:
        raise DeviceError(
            f"device={str(device)!r} does not say how much memory it has: neither mem_get_info nor the total_memory of "
            f"get_device_properties answers for torch.{place.type}. Use another version of it, or device='cpu'"
        )
    return int(total)


def peak_memory(device: str | torch.device) -> int:
    """Most bytes torch's allocator has had in use at once on an accelerator; 0 on the CPU.

    Raises:
        DeviceError: the device is not there, or does not count.
    """
    place = torch.device(device)
    if place.type == "cpu":
        return 0
    if (peak := _ask(place, "max_memory_allocated")) is None:
        raise DeviceError(
            f"device={str(device)!r} does not count the memory in use: neither torch.accelerator nor "
            f"torch.{place.type} has a max_memory_allocated that answers. Use another version of it, or device='cpu'"
        )
    return int(peak)


def release_unused_memory(device: str | torch.device) -> None:
    """Give what torch's allocator holds unused back to the device, where it can be asked to."""
    place = torch.device(device)
    if place.type != "cpu" and hasattr(module := accelerator_module(place), "empty_cache"):
        module.empty_cache()


def _ask(place: torch.device, *names: str) -> Any:
    """What torch says of a device under one of these names; None where none is there or has an answer.

    `torch.accelerator` counts memory since torch 2.9 and 2.10, and only where a device's allocator is of the common
    kind: it raises a RuntimeError elsewhere. The device's own module is asked then.
    """
    module = accelerator_module(place)
    for owner in (torch.accelerator, module):
        for name in names:
            if (ask := getattr(owner, name, None)) is not None:
                try:
                    return ask(place)
                except RuntimeError:
                    continue
    return None


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _place(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise DeviceError(
            f"device={str(device)!r} is no device of torch's: choose {default_device()!r} or 'cpu'"
        ) from error
