"""Adapters by model type. It knows names; it knows nothing of what an adapter does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..errors import UnsupportedError
from ..storage.strangers import code_of
from .base import LemaModelAdapter
from .families import known_type
from .gpt2 import GPT2Adapter
from .llama import LlamaAdapter
from .transformers_adapter import TransformersAdapter

_ADAPTERS: dict[str, type[LemaModelAdapter]] = {"gpt2": GPT2Adapter, "llama": LlamaAdapter}


def register_adapter(model_type: str, cls: type[LemaModelAdapter]) -> None:
    """Use this adapter for a model type; a registered one comes before the generic one.

    Args:
        model_type: the name `LemaConfig.model_type` or the model's own config has.
        cls: called with the model's configuration as a dict.
    """
    if not (isinstance(cls, type) and issubclass(cls, LemaModelAdapter)):
        raise TypeError(f"{cls!r} is not a subclass of LemaModelAdapter")
    _ADAPTERS[model_type] = cls


def get_adapter(model_type: str, config_dict: Mapping[str, Any] | PreTrainedConfig) -> LemaModelAdapter:
    """The adapter for a model type.

    Raises:
        UnsupportedError: (a `ValueError`) the type is neither registered nor a language model of transformers.
    """
    if isinstance(config_dict, PreTrainedConfig):
        config_dict = config_dict.to_dict()
    values = dict(config_dict)
    if model_type in _ADAPTERS:
        return _ADAPTERS[model_type](values)  # type: ignore[call-arg]
    try:
        known = known_type(CONFIG_MAPPING[model_type])
    except KeyError:
        known = False
    if not known and (code := code_of(values)):
        raise UnsupportedError(
            f"model type {model_type!r} is none of the installed transformers: it is code of its own "
            f"({'; '.join(code)}), which LEMA does not run. Read it, and register an adapter of yours with "
            "lema.models.register_adapter"
        )
    if not known:
        raise UnsupportedError(
            f"model type {model_type!r} is neither registered ({', '.join(sorted(_ADAPTERS))}) nor a language model "
            "of the installed transformers. Register an adapter with lema.models.register_adapter"
        )
    return TransformersAdapter({**values, "model_type": model_type})
