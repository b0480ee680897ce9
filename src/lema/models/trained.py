"""Whose parameters of a model are trained.

It knows how parameters are asked for and kept; it knows nothing of optimizers or of steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn


class HoldsModel(Protocol):
    """An adapter whose whole model can be asked for."""

    def causal_lm(self) -> Any:
        """The model; see `lema.models.causal_lm.CausalLM`."""


class Trained:
    """Parameters that are trained, and their files: here none; `lema.models.lora.LoRAManager` has LoRA's."""

    kind = "trained parameters"
    """What they are called in messages."""
    why_none = "use_lora is off"
    """Why there are none, where there are none."""

    def attach(self, adapter: HoldsModel) -> nn.Module:
        """Give a model its trained parameters, once; the module to call, whose mode is switched."""
        module: nn.Module = adapter.causal_lm().module
        return module

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names, as checkpoints have them, and parameters."""
        return []

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters, in the model's order; the same objects from first step to last."""
        return [parameter for _, parameter in self.named_parameters()]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write their values."""

    def load_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Read values that `save_pretrained` wrote."""


def trained_outside(module: nn.Module, layers: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """A model's trained parameters that are in none of its layers, by name."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in inside}
