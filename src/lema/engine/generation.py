"""Answers of a streamed model.

It knows transformers' `generate` and what a streamed model needs around it; it knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.memory import TripleBufferManager
from ..errors import UnsupportedError
from ..models.causal_lm import CausalLM
from .device_memory import explained


def generate(
    lm: CausalLM,
    model: nn.Module,
    memory: TripleBufferManager,
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
    with memory.turn.taken("generate"):
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), explained(memory.device, memory.plan):
                return module.generate(**given, **kwargs)
        except BaseException:
            memory.abort()
            raise
        finally:
            model.train(training)
