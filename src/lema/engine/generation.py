"""Answers of a streamed model.

It knows transformers' `generate` and what a streamed model needs around it; it knows nothing of text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import GENERATION_CONFIG_NAME

from ..errors import LemaError, UnsupportedError
from ..json_file import read_object
from ..models.causal_lm import CausalLM
from ..streaming.weight_store import WeightStore
from .device_memory import explained
from .turns import evaluating

logger = logging.getLogger(__name__)


def take_end_tokens(module: Any, folder: Path) -> None:
    """Let a model end where the `generation_config.json` of its folder says, as transformers would load it.

    Args:
        module: a model of transformers built from its configuration alone, which names one end token at most.
    """
    path = folder / GENERATION_CONFIG_NAME
    if not hasattr(module, "generation_config") or not path.is_file():
        return
    try:
        ends = read_object(path).get("eos_token_id")
    except (OSError, LemaError) as error:
        logger.warning("answers end where config.json says: %s", error)
        return
    listed = ends if isinstance(ends, list) else [ends]
    if not all(token is None or (isinstance(token, int) and token >= 0) for token in listed):
        logger.warning("%s: eos_token_id=%r is no token, so answers end where config.json says", path, ends)
        return
    module.generation_config.eos_token_id = ends


def end_tokens(module: Any) -> set[int]:
    """Tokens that end an answer of a model of transformers."""
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    return {token for token in (ends if isinstance(ends, list) else [ends]) if token is not None}


def generate(
    lm: CausalLM,
    model: nn.Module,
    memory: WeightStore,
    inputs: torch.Tensor | Mapping[str, Any],
    **kwargs: Any,
) -> Any:
    """transformers' `generate` with a key-value cache, layers streamed for each token.

    Args:
        model: the one whose mode is switched for it.
        inputs: ids `[batch, seq]`, or a mapping with `input_ids` and `attention_mask`.
        **kwargs: what transformers' `generate` takes.

    Returns:
        Ids `[batch, seq + new]`, or what `return_dict_in_generate` asks for.

    Raises:
        UnsupportedError: a family of one's own. StreamingError: another thread is in a step.
        DeviceMemoryError: rows and their cache do not fit into the device's memory.
    """
    module: Any = lm.module
    if not hasattr(module, "generate"):
        raise UnsupportedError(f"{type(module).__name__} has no generate of its own; only transformers models do")
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    given = {name: value.to(memory.device) for name, value in given.items()}
    kwargs.setdefault("use_cache", True)
    with memory.turn.taken("generate"), evaluating(model):
        try:
            with explained(memory.device, memory.plan):
                return module.generate(**given, **kwargs)
        except BaseException:
            memory.abort()
            raise
