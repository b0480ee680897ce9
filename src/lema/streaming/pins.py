"""Host memory that a device's driver locks, so that copies of it run beside the computation.

It knows addresses and the driver's two calls; it knows nothing of what lies there or is copied.
"""

from __future__ import annotations

import contextlib
import logging
import threading

import torch

from ..errors import StreamingError
from ..storage.layout import PAGE
from ..storage.views import keep_from_children

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of this process


class HostPins:
    """Host memory registered with the device's driver, in place and exactly as large as it is.

    It keeps what it pinned alive: memory freed while registered could never be registered again. Which drivers can:
    those whose torch module has CUDA's runtime (`cudart()`), as CUDA's and ROCm's have.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def add(self, buffer: torch.Tensor) -> str:
        """Register a `views.page_aligned` buffer; why that was refused, or nothing.

        Raises:
            StreamingError: some of the memory is pinned already.
        """
        start, nbytes = buffer.data_ptr(), buffer.numel() * buffer.dtype.itemsize
        assert buffer.device.type == "cpu" and buffer.is_contiguous(), "only flat host memory can be pinned"
        assert start % PAGE == 0, "memory that shares pages with other memory must not be pinned"
        with self._lock:
            if any(start < at + held.numel() and at < start + nbytes for at, held in self._buffers.items()):
                raise StreamingError("the same host memory was pinned twice")
            module = torch.get_device_module(self._device)
            if not hasattr(module, "cudart"):
                return f"torch cannot register memory for {self._device.type}"
            with module.device(self._device):
                result = int(module.cudart().cudaHostRegister(start, nbytes, _PORTABLE))
            if result != 0:
                _clear_error(self._device)
                return f"error {result} of the driver"
            self._buffers[start] = buffer.detach().view(torch.uint8)
            keep_from_children(self._buffers[start])
            return ""

    def remove(self, buffer: torch.Tensor) -> None:
        """Unregister a buffer; nothing if it is not registered."""
        with self._lock:
            if (held := self._buffers.pop(buffer.data_ptr(), None)) is not None:
                self._unregister(held)

    def clear(self) -> None:
        """Unregister everything."""
        with self._lock:
            while self._buffers:
                self._unregister(self._buffers.popitem()[1])

    def hold(self, host: torch.Tensor) -> bool:
        """Whether uint8 `[n]` on the host lies in registered memory."""
        start, end = host.data_ptr(), host.data_ptr() + host.numel()
        with self._lock:
            return any(at <= start and end <= at + held.numel() for at, held in self._buffers.items())

    def _unregister(self, held: torch.Tensor) -> None:
        module = torch.get_device_module(self._device)
        with module.device(self._device):
            result = int(module.cudart().cudaHostUnregister(held.data_ptr()))
        keep_from_children(held, False)
        if result != 0:
            _clear_error(self._device)
            logger.warning("unpinning host memory failed with error %d of the driver", result)


def _clear_error(device: torch.device) -> None:
    """Take back an error that was handled: the driver remembers it, and torch would report it at its next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)
