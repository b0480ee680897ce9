"""Random state: of the host and one device, noted and put back; and of all generators, for a checkpoint.

It knows torch's, Python's and numpy's generators; it knows nothing of layers or files.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
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


def random_states() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State of every generator there is, as tensors by name and a JSON-ready rest."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors.update({f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(numpy.asarray(keys, dtype=numpy.int64))
    rest = {"python": [version, list(internal), gauss], "numpy": [str(kind), int(position), int(has_gauss), cached]}
    return tensors, rest


def restore_random_states(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    """Go on from what `random_states` noted, on the devices that are there."""
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if (state := tensors.get(f"cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state, i)
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, position, has_gauss, cached = rest["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, cached))
