"""The end of a step: gradients that gathered, their norm, and the optimizer.

It knows parameters, gradients and an optimizer; it knows nothing of layers or of where a loss came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..core.binding import page_aligned, typed_view


def step_optimizer(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float | None,
) -> float:
    """Unscale, clip and step; returns the global norm before clipping.

    A norm that is not finite is returned without a step where no loss scale explains it, and else makes the
    scaler skip the step and lower its scale.
    """
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients))
    finite = math.isfinite(norm)
    if not finite and not scaler.is_enabled():
        return norm
    if not finite and all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        # The sum of squares overflowed although no gradient did: the scaler has seen nothing, and would step.
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        return norm
    if max_grad_norm is not None and finite:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm))
    scaler.step(optimizer)
    scaler.update()
    return norm


class GradientBuffer:
    """One buffer in which the gradients of a window gather, off the heap that layers use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes: torch.Tensor | None = None

    def place(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every parameter a gradient of zeros in the buffer."""
        if self._bytes is None:
            nbytes = sum(p.numel() * p.dtype.itemsize for p in parameters)
            on_cpu = self._device.type == "cpu"
            self._bytes = page_aligned(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8).to(self._device)
        self._bytes.zero_()
        offset = 0
        for parameter in parameters:
            parameter.grad = typed_view(self._bytes, offset, parameter.dtype, parameter.shape)
            offset += parameter.numel() * parameter.dtype.itemsize
