"""Whether layers draw random numbers, so that a replay must begin from the state they began from.

It knows modules and random states; it knows nothing of how a layer is replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import StreamingError
from .randomness import RandomState


class Draws:
    """Decides for each forward whether random states are noted at every layer and micro-batch.

    They are while a dropout module is switched on, in the first forward of all, and from then on if anything was drawn
    in it. Else the state is looked at twice a forward, at its begin and its end.

    Args:
        layers: those that are replayed.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        self.noting = True
        """Whether layers note their random states now."""
        self._layers = layers
        self._seen: bool | None = None
        self._begun = False
        self._before: RandomState | None = None

    def begin(self, device: torch.device) -> None:
        """A forward with gradients begins."""
        self.noting = self._seen is not False or any(
            isinstance(module, _DropoutNd) and module.training and module.p > 0
            for layer in self._layers
            for module in layer.modules()
        )
        self._begun = True
        self._before = None if self.noting else RandomState.now(device)

    def drew(self) -> None:
        """A layer has drawn."""
        self._seen = True

    def end(self) -> None:
        """The forward is over, whether it had gradients or not.

        Raises:
            StreamingError: numbers were drawn though no dropout is on and none were before: a replay would draw others.
        """
        before, self._before = self._before, None
        begun, self._begun = self._begun, False
        if begun and self._seen is None:
            self._seen = False
        if before is not None and before.moved():
            self._seen = True
            raise StreamingError(
                "a layer drew random numbers although it has no dropout module that is on and drew none in earlier "
                "forwards, so its state was not noted and its backward would draw others; run this step again: states "
                "are noted at every layer from now on"
            )
