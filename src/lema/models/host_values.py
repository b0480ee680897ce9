"""Values of a batch that are on the host as well as on a device, so that reading them waits for nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


class HostValues:
    """The host's tensors behind those of a device, while a forward runs on these."""

    def __init__(self) -> None:
        self._pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @contextlib.contextmanager
    def known(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
        """Inside the block: by name, a tensor as the model gets it and the same one of the host."""
        before, self._pairs = self._pairs, tuple(pairs.values())
        try:
            yield
        finally:
            self._pairs = before

    def of(self, values: torch.Tensor) -> torch.Tensor | None:
        """The same values on the host, if known; GPT-2 looks up a view of its ids, which will do."""
        given = values if values._base is None else values._base
        for there, here in self._pairs:
            if there is given and values.numel() == here.numel() and values.is_contiguous():
                return here.view(values.shape)
        return None
