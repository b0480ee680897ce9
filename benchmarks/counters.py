"""What a process can say of its own memory and reads: the host's by the kernel's files, the device's by torch.

It knows counters; it knows nothing of models or of what they are compared with.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

MIB = 1 << 20


def proc_value(name: str, key: str) -> int | None:
    """A number out of `/proc/self/<name>`; None on systems without it."""
    try:
        lines = Path("/proc/self", name).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def peak_mib() -> float:
    """Highest resident set of this program so far, mapped file pages included.

    VmHWM, which is `ru_maxrss` without what the parent process held before exec; `ru_maxrss` elsewhere.
    """
    kib = proc_value("status", "VmHWM")
    if kib is None:
        import resource

        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    return kib / 1024


def status_mib(key: str) -> float | None:
    """A size out of `/proc/self/status`, as VmRSS, RssAnon or RssFile."""
    kib = proc_value("status", key)
    return None if kib is None else round(kib / 1024, 1)


class Device:
    """Where layers are computed, and its own count of memory. On the CPU everything here does nothing."""

    def __init__(self, name: str) -> None:
        import torch

        self.place = torch.device(name)
        self._module = None if self.place.type == "cpu" else torch.get_device_module(self.place)
        if self._module is not None:  # the context and the matmul library are part of the imports
            a_little = torch.ones(64, 64, device=self.place)
            (a_little @ a_little).sum().item()

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self._module is not None:
            self._module.synchronize(self.place)

    def allocated_mib(self) -> float | None:
        """What tensors take now."""
        return None if self._module is None else round(self._module.memory_allocated(self.place) / MIB, 1)

    def numbers(self) -> dict[str, Any]:
        """Peaks so far: of tensors, of what the allocator held for them; and all that is taken of the device now."""
        if self._module is None:
            return {}
        free, total = self._module.mem_get_info(self.place)
        return {
            "device_name": self._module.get_device_name(self.place),
            "device_peak_mib": round(self._module.max_memory_allocated(self.place) / MIB, 1),
            "device_reserved_mib": round(self._module.max_memory_reserved(self.place) / MIB, 1),
            "device_taken_mib": round((total - free) / MIB, 1),
        }
