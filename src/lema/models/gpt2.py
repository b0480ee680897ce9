"""GPT-2's adapter: the generic one, with the type given and the LoRA targets GPT-2 has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .transformers_adapter import TransformersAdapter


class GPT2Adapter(TransformersAdapter):
    """Adapter for GPT-2 from its transformers config as a dict."""

    default_target_modules = ("c_attn", "c_proj", "c_fc")

    def __init__(self, config_dict: Mapping[str, Any]) -> None:
        super().__init__({**config_dict, "model_type": "gpt2"})
