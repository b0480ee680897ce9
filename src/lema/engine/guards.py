"""What keeps a streamed model whole: no casts, moves or merges of weights not there; states and saves without them.

It knows what users and libraries call on models; it knows nothing of how weights come.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..errors import BindingError
from ..models.causal_lm import CausalLM
from ..models.interceptor import Interceptor
from ..streaming.weight_store import WeightStore
from .base_state import state_from_files

logger = logging.getLogger(__name__)


def guard(lm: CausalLM, memory: WeightStore) -> None:
    """Put the refusals on a model whose layers are streamed; a fully resident one only ignores checkpointing."""
    put = functools.partial(lm.interceptor.replace, "guards")
    put(lm.module, "gradient_checkpointing_enable", _checkpointing_is_built_in)
    put(lm.module, "enable_input_require_grads", _needs_no_gradient)
    if not memory.streamed:
        return
    owners = [module for unit in memory.streamed for module in lm.layers[unit].modules()]
    saves = state_from_files(memory)
    for module, save in saves.items():
        put(module, "_save_to_state_dict", save)
    for module in (lm.module, *owners):
        put(module, "_apply", functools.partial(_apply, module))
    for module in owners:
        if issubclass(type(module), BaseTunerLayer):
            put(module, "merge", refuse_merge)
        if not saves and any(True for _ in module.parameters(recurse=False)) and not _holds_adapter(module):
            lm.interceptor.hook("guards", module.register_state_dict_pre_hook(_refuse_state_dict))
    put(lm.module, "save_pretrained", functools.partial(_save_adapters_only, lm.module))
    put(lm.module, "__deepcopy__", _refuse_copy)


def guard_peft(interceptor: Interceptor, model: PeftModel, tuner: BaseTuner) -> None:
    """Make PEFT's own `save_pretrained` take the adapters' tensors, all there are, without asking for the base's.

    It is what trainers call to save: with `state_dict=None`, or with the state of the whole model.

    Args:
        model: PEFT's model. tuner: the part of it that is around transformers' model.
    """
    prefix = tuner.prefix
    save: Any = type(model).__dict__.get("save_pretrained") or PeftModel.save_pretrained

    def save_adapters(directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("save_embedding_layers", False)
        if kwargs.get("state_dict") is None and kwargs["save_embedding_layers"] is not True:
            own = {name: p.detach() for name, p in model.named_parameters() if prefix in name}
            kwargs["state_dict"] = own
        save(model, os.fspath(directory), *args, **kwargs)

    interceptor.replace("adapters", model, "save_pretrained", save_adapters)
    interceptor.replace("adapters", model, "_apply", functools.partial(_apply, model))


def _holds_adapter(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _apply(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
    for parameter in module.parameters():
        probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise BindingError(
                f"this model's weights are streamed into fixed {probe.dtype} memory on {probe.device} and cannot be "
                f"changed to {moved.dtype} on {moved.device}; choose dtype and device in LemaConfig"
            )
    return module


def _checkpointing_is_built_in(*_: Any, **__: Any) -> None:
    logger.info("gradient_checkpointing_enable() does nothing here: every layer is recomputed in the backward anyway")


def refuse_merge(*_: Any, **__: Any) -> NoReturn:
    raise BindingError(
        "adapters cannot be merged into streamed weights: the next load would overwrite them. Save the adapter and "
        "merge it into the files"
    )


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> NoReturn:
    raise BindingError(
        f"state_dict() was asked of streamed weights ({prefix or type(module).__name__}), which are not all in memory; "
        "save_pretrained() saves the adapter, the base is in its own files"
    )


def _needs_no_gradient(*_: Any, **__: Any) -> None:
    """Checkpointing of torch's older kind wants inputs with gradients; a streamed layer asks its parameters."""


def _refuse_copy(*_: Any, **__: Any) -> NoReturn:
    raise BindingError(
        "a streamed model cannot be copied: its weights are in memory a few layers at a time. Open it once more; for a "
        "reference model switch the adapters off instead (disable_adapter())"
    )


def _save_adapters_only(module: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(module, "_hf_peft_config_loaded", False):  # adapters of transformers' own add_adapter()
        return type(module).save_pretrained(module, *args, **kwargs)
    raise BindingError(
        "the base model's weights are streamed and stay in their files; save the adapters: save_pretrained() of PEFT's "
        "model, or of LemaModel"
    )
