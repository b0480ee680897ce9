"""The optimizer's side of the adapters in host memory: fp32 masters, gradients and the state that grows from them.

It knows parameters, their gradients and an optimizer's groups; it knows nothing of update rules or of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..storage.views import page_aligned, typed_view
from ..streaming.backend import DeviceBackend


class HostMasters:
    """Keeps fp32 copies of parameters on the host and lets an optimizer work on these.

    Layout: masters and gradients lie in two page-aligned buffers, pinned where there is a device. The
    optimizer's groups are made to hold the masters in place of the parameters, so that its state is made
    beside them and schedulers see the same groups.

    Mechanics: as soon as the backward has accumulated a parameter's gradient it is added to the master's
    and given up, so that the device holds gradients of one layer at a time. After every step of the
    optimizer the masters are copied into the parameters. Both ways go through the stream that computes and
    do not block the host; `synchronize` waits for all of them at once, before the host looks.

    Args:
        parameters: those computed with; they stay the same objects.
        optimizer: over some of them.
        backend: pins the buffers; None on CPU.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, backend: DeviceBackend | None = None
    ) -> None:
        self.parameters = list(parameters)
        total = sum(p.numel() for p in self.parameters) * 4
        self._values, self._gradients = page_aligned(total), page_aligned(total)
        if backend is not None:
            for buffer in (self._values, self._gradients):
                backend.pin(buffer)
        self._backend = backend
        self._arrived = None if backend is None else backend.event()
        self.masters: list[nn.Parameter] = []
        self._views: list[torch.Tensor] = []
        offset = 0
        for parameter in self.parameters:
            value = typed_view(self._values, offset, torch.float32, parameter.shape)
            with torch.no_grad():
                value.copy_(parameter)
            self.masters.append(nn.Parameter(value))
            self._views.append(typed_view(self._gradients, offset, torch.float32, parameter.shape))
            offset += parameter.numel() * 4
        replaced = {id(p): m for p, m in zip(self.parameters, self.masters, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]
        for held, state in list(optimizer.state.items()):
            if id(held) in replaced:
                optimizer.state[replaced[id(held)]] = {
                    key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()
                }
                del optimizer.state[held]
        optimizer.register_step_post_hook(lambda *_: self.copy_to_model())
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda p, index=index: self._take(index, p))

    def _take(self, index: int, parameter: torch.Tensor) -> None:
        """Add a gradient to the master's; the first of a window replaces what is there."""
        gradient, master, view = parameter.grad, self.masters[index], self._views[index]
        assert gradient is not None
        if master.grad is not None:  # added where it is: the host's copy may still be on its way
            gradient = master.grad.to(gradient.device, non_blocking=True).add_(gradient)
        view.copy_(gradient, non_blocking=True)
        master.grad = view
        parameter.grad = None

    def synchronize(self) -> None:
        """Wait until gradients and values lie where they were copied to; before masters or gradients are touched."""
        if self._backend is not None and self._arrived is not None:
            self._backend.compute_stream().record_event(self._arrived)
            self._arrived.synchronize()

    def hand_back_gradients(self) -> None:
        """Give the parameters their gradients again, to be looked at."""
        self.synchronize()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = None if master.grad is None else master.grad.to(parameter)

    def drop_gradients(self) -> None:
        """Forget gradients on both sides."""
        held: list[nn.Parameter] = [*self.parameters, *self.masters]
        for parameter in held:
            parameter.grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Copy the masters' values into the parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master, non_blocking=True)

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """Take the parameters' values over, after they were loaded."""
        self.synchronize()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.copy_(parameter)
