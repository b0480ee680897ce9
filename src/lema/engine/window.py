"""What one optimizer step is made of: the calls since the last one, counted in target tokens.

It knows counts and gradients' common factor; it knows nothing of models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError


@dataclass(slots=True)
class Window:
    """Gradient accumulation.

    Gradients of each call are formed divided by `denominator`, fixed by the first call as its targets times
    the number of calls expected; when the window ends they are multiplied by denominator / targets, so the
    sum over all calls is divided by all targets however they were spread. With one call that factor is 1
    and nothing is multiplied.
    """

    length: int
    calls: int = 0
    targets: int = 0
    denominator: float = 0.0

    def expect(self, targets: int) -> float:
        """The denominator of a call with this many targets."""
        if self.calls == 0:
            self.denominator = float(targets * self.length)
        return self.denominator

    def add(self, targets: int) -> None:
        """Count a call whose backward has run."""
        self.calls += 1
        self.targets += targets

    @property
    def full(self) -> bool:
        """Whether the optimizer is to step now."""
        return self.calls >= self.length

    def normalize_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Bring gradients from the denominator expected to the targets there were."""
        factor = self.denominator / self.targets
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block one call is a window; `ConfigError` if calls of another one wait for its end."""
        if self.calls:
            raise ConfigError(f"{self.calls} calls of train_step are waiting for their step: call finish()")
        before, self.length = self.length, 1
        try:
            yield
        finally:
            self.length = before

    def reset(self) -> None:
        """Begin the next window."""
        self.calls, self.targets, self.denominator = 0, 0, 0.0

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"calls": self.calls, "targets": self.targets, "denominator": self.denominator}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.calls, self.targets, self.denominator = state["calls"], state["targets"], state["denominator"]
