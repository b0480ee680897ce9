"""Whose parameters of a model are trained.

It knows how parameters are asked for and kept; it knows nothing of optimizers or of steps.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from torch import nn


class HoldsModel(Protocol):
    """An adapter whose whole model can be asked for."""

    def causal_lm(self) -> Any:
        """The model; see `lema.models.causal_lm.CausalLM`."""


class Trained(Protocol):
    """Parameters that are trained, and their files; `lema.models.lora.LoRAManager` is one."""

    def attach(self, adapter: HoldsModel) -> nn.Module:
        """Give a model its trained parameters, once; the module to call, whose mode is switched."""

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters in the model's order; the same objects from first step to last."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names, as checkpoints have them, and parameters."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write their values."""

    def load_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Read values that `save_pretrained` wrote."""


class Frozen:
    """Nothing is trained: a model as its files have it."""

    def attach(self, adapter: HoldsModel) -> nn.Module:
        """The bare model."""
        module: nn.Module = adapter.causal_lm().module
        return module

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """None at all."""
        return []

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """None at all."""
        return []

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """There is nothing to write."""

    def load_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """There is nothing to read."""
