"""What a model's weights are for, as far as quantising them is concerned.

It knows modules; it knows nothing of formats or files.
"""

from __future__ import annotations

from enum import Enum

from torch import nn
from transformers import PreTrainedModel

from .skeleton import find_layers

_ROUTERS = ("gate", "router", "shared_expert_gate")


class WeightKind(Enum):
    """What a matrix of weights is for."""

    LAYER = "layer"
    """A linear module of a decoder layer, or its experts' matrices in one tensor."""
    ROUTER = "router"
    """Decides which experts a token goes to."""
    EMBEDDING = "embedding"
    """Tokens' vectors, those of a head that is tied to them among them."""
    HEAD = "head"
    """From hidden states to the vocabulary."""


def weight_kinds(model: PreTrainedModel) -> dict[str, WeightKind]:
    """Parameters that are matrices, by name, and what they are for. Norms, biases and convolutions are left out."""
    layers, _ = find_layers(model)
    found = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or leaf == "bias" or parameter.dim() < 2:
                continue
            if module is model.get_input_embeddings():
                kind = WeightKind.EMBEDDING
            elif module is model.get_output_embeddings():
                kind = WeightKind.HEAD
            elif not path.startswith(f"{layers}."):
                continue
            elif path.rpartition(".")[2] in _ROUTERS or "Router" in type(module).__name__:
                kind = WeightKind.ROUTER
            elif type(module) is nn.Linear or (
                parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            ):
                kind = WeightKind.LAYER
            else:
                continue
            found[f"{path}.{leaf}"] = kind
    tied = model.all_tied_weights_keys
    return {name: kind for name, kind in found.items() if name not in tied}


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Paths of the modules that a library which quantises linear ones would take."""
    return [path for path, module in model.named_modules() if type(module) is nn.Linear]
