"""Random state of the host and of one device, noted and put back.

It knows torch's generators; it knows nothing of layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RandomState:
    """State of the default generators of the host and of a device (None: the host's own)."""

    device: torch.device
    host: torch.Tensor
    there: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """As it is; reading it does not wait for the device."""
        there = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), there)

    def moved(self) -> bool:
        """Whether random numbers have been drawn since."""
        later = RandomState.now(self.device)
        same = self.there is None or (later.there is not None and torch.equal(self.there, later.there))
        return not (same and torch.equal(self.host, later.host))

    def restore(self) -> None:
        """Go on from here."""
        torch.set_rng_state(self.host)
        if self.there is not None:
            torch.get_device_module(self.device).set_rng_state(self.there, self.device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """This state inside the block; afterwards the one before it."""
        before = RandomState.now(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()
