"""A transformers model with all its code and none of its weights.

It knows how to build the model and where its layers are; it knows nothing of files.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedError
from ..machine.heap import apart_from_heap
from .families import auto_class_of, class_of, is_composite
from .outputs import take_out_outputs

logger = logging.getLogger(__name__)


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The whole model of a config; parameters are frozen zeros that take no memory, buffers are real.

    Raises:
        UnsupportedError: transformers has no such causal language model, or not with this attention.
    """
    auto = auto_class_of(config)
    if auto is None:
        raise UnsupportedError(f"model type {config.model_type!r} is no language model of transformers")
    family = class_of(auto, config)
    if attn_implementation == "sdpa" and not getattr(family, "_supports_sdpa", False):
        logger.info("%s has no sdpa attention, using eager", family.__name__)
        attn_implementation = "eager"
    for name in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, name, None)):  # a kernel of the hub that config.json names: code of strangers
            logger.warning("config.json names the kernel %s, which is not run", getattr(config, name))
            setattr(config, name, None)
    _forget_codes(config)
    take_out_outputs(config)
    try:
        with apart_from_heap(), init_empty_weights(include_buffers=False):
            model: Any = auto.from_config(
                config, dtype=dtype, attn_implementation=_attention_of_parts(config, attn_implementation),
                trust_remote_code=False,
            )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise UnsupportedError(f"{family.__name__} cannot be built: {error}") from error
    if any(getattr(part, "is_encoder_decoder", False) for part in (model.config, model.config.get_text_config())):
        raise UnsupportedError(
            f"{family.__name__} is an encoder with a decoder: its rows are pairs of texts, and LEMA trains decoders"
        )
    model.config.use_cache = False
    if model.loss_type is None:  # its class has a name of its own: transformers would say so and take this one
        model.loss_type = "ForCausalLM"
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shared.setdefault(id(parameter), _hollow(parameter))
                module._parameters[name] = shared[id(parameter)]
    built: PreTrainedModel = model
    return built


def _attention_of_parts(config: PreTrainedConfig, asked: str | None) -> Any:
    """The attention asked for, of a configuration with parts its text's alone: towers do not run, and some have no
    other than eager."""
    if asked is None or not is_composite(config):
        return asked
    text = config.get_text_config()
    return {"": asked} | {
        name: asked if getattr(config, name, None) is text else "eager" for name in getattr(config, "sub_configs", ())
    }


def _forget_codes(config: PreTrainedConfig) -> None:
    """Modules of the skeleton are plain ones, whatever the files keep: codes are decoded before a module sees them."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)


def _hollow(parameter: torch.Tensor) -> nn.Parameter:
    """A frozen parameter of the same shape and type over a single zero."""
    return nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the list of checkpointable layers of the text decoder.

    Others may lie deeper in it, in towers; whether text reaches them is found out when they are left out.

    Raises:
        UnsupportedError: there is none, or more than one as deep.
    """
    found = layer_lists(model, _decoder_path(model)) or layer_lists(model)
    depth = min((path.count(".") for path in found), default=0)
    shallowest = {path: layers for path, layers in found.items() if path.count(".") == depth}
    if len(shallowest) != 1:
        names = ", ".join(shallowest) or "none"
        raise UnsupportedError(
            f"{type(model).__name__} has {len(shallowest)} lists of decoder layers ({names}); LEMA streams models with "
            "exactly one. Write an adapter and register it with lema.models.register_adapter"
        )
    return next(iter(shallowest.items()))


def refuse_other_layers(model: PreTrainedModel, layers_path: str) -> None:
    """`UnsupportedError` where a model has more lists of checkpointable layers than the one at a path."""
    others = [path for path in layer_lists(model) if not f"{path}.".startswith(f"{layers_path}.")]
    if others:
        raise UnsupportedError(
            f"{type(model).__name__} has {len(others) + 1} lists of layers that text goes through ({layers_path}, "
            f"{', '.join(others)}); LEMA streams models with exactly one. Write an adapter and register it with "
            "lema.models.register_adapter"
        )


def layer_lists(model: nn.Module, inside: str = "") -> dict[str, nn.ModuleList]:
    """Lists of checkpointable layers in a model or a part of it, by their paths in the model."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(item, GradientCheckpointingLayer) for item in module)
        and (not inside or path.startswith(f"{inside}."))
    }


def _decoder_path(model: PreTrainedModel) -> str:
    """Path of the text decoder; empty where a model names none."""
    decoder = model.get_decoder()
    return next((path for path, module in model.named_modules() if module is decoder), "")


def stand_in_ids(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    """Token ids `[rows, length]` for a forward that depends on no token; none is padding, of which models warn."""
    token = int(getattr(model.config, "pad_token_id", None) == 0)
    return torch.full(shape, token, dtype=torch.long, device=model.device)
