"""The end of a step: gradients that gathered, their norm, and the optimizer.

It knows parameters, gradients and an optimizer; it knows nothing of layers or of where a loss came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..coordinator import Coordinator
from ..storage.views import page_aligned, typed_view
from .loss_scale import LossScale


def step_optimizer(
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale,
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float | None,
    coordinator: Coordinator | None = None,
) -> float:
    """Unscale, clip and step; returns the global norm before clipping, the one number the host waits for.

    Where the norm is not finite nothing is stepped, and a loss scale is lowered. That is also so where only the sum
    of squares overflowed: what no gradient shows is no reason to step. All ranks go by the first one's norm.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    loss_scale.unscale(gradients)
    norm = (coordinator or Coordinator()).broadcast("norm", float(nn.utils.get_total_norm(gradients)))
    finite = math.isfinite(norm)
    if finite:
        if max_grad_norm is not None:
            _clip(gradients, norm, max_grad_norm)
        optimizer.step()
    loss_scale.update(finite)
    return norm


def _clip(gradients: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """As `torch.nn.utils.clip_grads_with_norm_`, to the last bit, with a factor that need not travel to the device."""
    factor = float(torch.clamp(max_norm / (torch.tensor(norm) + 1e-6), max=1.0))
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


class GradientBuffer:
    """One buffer in which the gradients of a window gather, off the heap that layers use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes: torch.Tensor | None = None
        self._versions: dict[nn.Parameter, tuple[int, int]] = {}

    def place(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every parameter a gradient of zeros in the buffer."""
        if self._bytes is None:
            nbytes = sum(p.numel() * p.dtype.itemsize for p in parameters)
            on_cpu = self._device.type == "cpu"
            self._bytes = page_aligned(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8).to(self._device)
        self._bytes.zero_()
        offset = 0
        for parameter in parameters:
            gradient = typed_view(self._bytes, offset, parameter.dtype, parameter.shape)
            parameter.grad = gradient
            self._versions[parameter] = (gradient.data_ptr(), gradient._version)
            offset += parameter.numel() * parameter.dtype.itemsize

    def unreached(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Those of the parameters to whose gradient nothing was added since it was placed."""
        placed = ((parameter, self._versions.get(parameter)) for parameter in parameters)
        return [p for p, version in placed if p.grad is not None and version == (p.grad.data_ptr(), p.grad._version)]


def drop_zeros(parameters: Sequence[nn.Parameter]) -> None:
    """Take gradients of zeros away: an optimizer lets weights decay and moments fade by them, and does neither where
    there is no gradient."""
    for parameter in parameters:
        if parameter.grad is not None and not bool(parameter.grad.any()):
            parameter.grad = None
