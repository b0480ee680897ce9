"""Makes the compiled device a torch device, with the module that torch and its users ask things of."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch._meta_registrations  # shapes of operators that have no meta kernel in C++

from . import NAME, build

DeviceLike = torch.device | str | int | None


@functools.cache
def register() -> ModuleType:
    """Build and register the device; its compiled module. Once a process, before anything asks for an accelerator.

    Raises:
        RuntimeError: it cannot be built, or another PrivateUse1 device is there.
    """
    compiled = build.load()
    torch.utils.rename_privateuse1_backend(NAME)
    compiled.register_device()
    torch._register_device_module(NAME, _DeviceModule(compiled))
    torch.utils.generate_methods_for_privateuse1_backend()
    atexit.register(compiled.synchronize)  # before Python ends under the streams' threads
    return compiled


class _DeviceModule(ModuleType):
    """`torch.virtual`, as `torch.cuda` is there for CUDA."""

    def __init__(self, compiled: Any) -> None:
        super().__init__(f"torch.{NAME}")
        self._compiled = compiled
        self._forked = False
        os.register_at_fork(after_in_child=functools.partial(setattr, self, "_forked", True))

    # -- what there is -----------------------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return self._forked

    def _lazy_init(self) -> None:
        if self._forked:
            raise RuntimeError(f"the {NAME} device cannot be used in a forked child")

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: DeviceLike) -> None:
        """There is one."""

    def device(self, device: DeviceLike) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_device_name(self, device: DeviceLike = None) -> str:
        return NAME

    def get_device_properties(self, device: DeviceLike = None) -> SimpleNamespace:
        return SimpleNamespace(name=NAME, total_memory=self._compiled.capacity())

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: DeviceLike = None) -> None:
        torch.accelerator.synchronize()

    # -- random numbers ----------------------------------------------------------------------------

    def manual_seed(self, seed: int) -> None:
        self._compiled.manual_seed(int(seed) & (2**64 - 1))

    def manual_seed_all(self, seed: int) -> None:
        self.manual_seed(seed)

    def initial_seed(self) -> int:
        return int(self._compiled.seed())

    def get_rng_state(self, device: DeviceLike = NAME) -> torch.Tensor:
        return self._compiled.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: DeviceLike = NAME) -> None:
        self._compiled.set_rng_state(state)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self.get_rng_state()]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        self.set_rng_state(states[0])

    # -- memory ------------------------------------------------------------------------------------

    def cudart(self) -> SimpleNamespace:
        """The two calls of CUDA's runtime that pin memory of the host."""
        return SimpleNamespace(
            cudaHostRegister=lambda address, nbytes, flags: self._compiled.register_host(address, nbytes),
            cudaHostUnregister=self._compiled.unregister_host,
        )

    def mem_get_info(self, device: DeviceLike = None) -> tuple[int, int]:
        return torch.accelerator.get_memory_info()

    def memory_stats(self, device: DeviceLike = None) -> dict[str, Any]:
        return torch.accelerator.memory_stats()

    def memory_allocated(self, device: DeviceLike = None) -> int:
        return torch.accelerator.memory_allocated()

    def max_memory_allocated(self, device: DeviceLike = None) -> int:
        return torch.accelerator.max_memory_allocated()

    def memory_reserved(self, device: DeviceLike = None) -> int:
        return torch.accelerator.memory_reserved()

    def max_memory_reserved(self, device: DeviceLike = None) -> int:
        return torch.accelerator.max_memory_reserved()

    def reset_peak_memory_stats(self, device: DeviceLike = None) -> None:
        torch.accelerator.reset_peak_memory_stats()

    def empty_cache(self) -> None:
        torch.accelerator.empty_cache()
