"""A transformers model with all its code and none of its weights.

It knows how to build the model and where its layers are; it knows nothing of files.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedError
from ..machine.heap import apart_from_heap
from .outputs import take_out_outputs

logger = logging.getLogger(__name__)


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The causal language model of a config; parameters are frozen zeros that take no memory, buffers are real.

    Raises:
        UnsupportedError: transformers has no such causal language model, or not with this attention.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(f"model type {config.model_type!r} is not a causal language model of transformers")
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if attn_implementation == "sdpa" and not getattr(family, "_supports_sdpa", False):
        logger.info("%s has no sdpa attention, using eager", family.__name__)
        attn_implementation = "eager"
    for name in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, name, None)):  # a kernel of the hub that config.json names: code of strangers
            logger.warning("config.json names the kernel %s, which is not run", getattr(config, name))
            setattr(config, name, None)
    take_out_outputs(config)
    try:
        with apart_from_heap(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
            )
    except (ValueError, ImportError) as error:
        raise UnsupportedError(f"{family.__name__} cannot be built: {error}") from error
    model.config.use_cache = False
    if model.loss_type is None:  # its class has a name of its own: transformers would say so and take this one
        model.loss_type = "ForCausalLM"
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shared.setdefault(id(parameter), _hollow(parameter))
                module._parameters[name] = shared[id(parameter)]
    return model


def _hollow(parameter: torch.Tensor) -> nn.Parameter:
    """A frozen parameter of the same shape and type over a single zero."""
    return nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the one list of checkpointable layers.

    Raises:
        UnsupportedError: there is none, or more than one.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(item, GradientCheckpointingLayer) for item in module)
    ]
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise UnsupportedError(
            f"{type(model).__name__} has {len(found)} lists of decoder layers ({names}); LEMA streams models with "
            "exactly one. Write an adapter and register it with lema.models.register_adapter"
        )
    return found[0]


def stand_in_ids(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    """Token ids `[rows, length]` for a forward that depends on no token; none is padding, of which models warn."""
    token = int(getattr(model.config, "pad_token_id", None) == 0)
    return torch.full(shape, token, dtype=torch.long, device=model.device)
