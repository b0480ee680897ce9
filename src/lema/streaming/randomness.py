"""Random state: of the host and one device, noted and put back; and as a checkpoint keeps it.

It knows torch's, Python's and numpy's generators; it knows nothing of layers or files.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

logger = logging.getLogger(__name__)


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


def random_states(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State of the host's generators and of a device's, as tensors by name and a JSON-ready rest.

    A device's is named by torch's kind and number of it, as in `cuda.0`.
    """
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors[f"{device.type}.{_number(device)}"] = torch.get_device_module(device).get_rng_state(device)
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(numpy.asarray(keys, dtype=numpy.int64))
    rest = {"python": [version, list(internal), gauss], "numpy": [str(kind), int(position), int(has_gauss), cached]}
    return tensors, rest


def restore_random_states(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any], device: torch.device) -> None:
    """Go on from what `random_states` noted.

    Another card of the same kind takes the state of the one that was used. Another kind of device draws other numbers
    from any state, so there one line in the log says that dropout goes on differently.
    """
    torch.set_rng_state(tensors["cpu"])
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, position, has_gauss, cached = rest["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, cached))
    saved = {name: state for name, state in tensors.items() if name not in ("cpu", "numpy")}
    drawn_on = sorted({name.partition(".")[0] for name in saved}) or ["cpu"]
    if device.type not in drawn_on:
        logger.warning(
            "the checkpoint's random numbers were drawn on %s, and this run draws on %s: dropout, where there is any, "
            "goes on with other numbers than the run would have had there",
            " and ".join(drawn_on),
            device.type,
        )
    elif device.type != "cpu":
        names = sorted(name for name in saved if name.startswith(f"{device.type}."))
        own = f"{device.type}.{_number(device)}"
        state = saved[own if own in names else names[0]]
        torch.get_device_module(device).set_rng_state(state, device)


def _number(device: torch.device) -> int:
    return device.index if device.index is not None else torch.get_device_module(device).current_device()
