"""What the original's `LemaTrainer` had and a step has no use for."""

from __future__ import annotations

from typing import Any


class OriginalTrainer:
    """Names for those who come from there, of a trainer of steps."""

    attachment: Any

    @property
    def adapter(self) -> Any:
        """The model, as `LemaTrainer` is given it."""
        return self.attachment.adapter

    @property
    def gbi(self) -> Any:
        """Its weights."""
        return self.attachment.memory.gbi

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The model's layers by the original's ids; see `LemaModelAdapter.get_layer_metadata`."""
        layers: list[dict[str, Any]] = self.adapter.get_layer_metadata()
        return layers
