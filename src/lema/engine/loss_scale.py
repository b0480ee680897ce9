"""What fp16 multiplies the loss with, so that small gradients do not become zero.

It knows numbers and whether a step's gradients were finite; it knows nothing of how they came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(slots=True)
class LossScale:
    """Dynamic loss scaling by the rule of `torch.amp.GradScaler`, whose state it saves and loads.

    The scale is a number of the host, and whether gradients are finite is told by their norm, which the host reads
    anyway: so nothing waits for the device, as reading GradScaler's two tensors would.

    Source of the rule: Micikevicius et al., Mixed Precision Training (2018), section 3.2.
    """

    enabled: bool
    scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    """Finite steps after which the scale grows."""
    finite_steps: int = 0
    """Since the scale last changed."""

    @property
    def factor(self) -> float:
        """What to multiply the loss with; 1 where scaling is off."""
        return self.scale if self.enabled else 1.0

    def unscale(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if self.enabled and gradients:
            torch._foreach_mul_(list(gradients), 1.0 / self.scale)

    def update(self, finite: bool) -> None:
        """Lower the scale after a step that overflowed, raise it after many that did not."""
        if not self.enabled:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.scale *= self.backoff_factor
        elif self.finite_steps == self.growth_interval:
            self.finite_steps = 0
            grown = self.scale * self.growth_factor
            self.scale = grown if grown <= _LARGEST else self.scale

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready, by GradScaler's names; empty where scaling is off."""
        if not self.enabled:
            return {}
        return {
            "scale": self.scale, "growth_factor": self.growth_factor, "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval, "_growth_tracker": self.finite_steps,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.scale, self.growth_factor = state["scale"], state["growth_factor"]
        self.backoff_factor, self.growth_interval = state["backoff_factor"], state["growth_interval"]
        self.finite_steps = state["_growth_tracker"]
