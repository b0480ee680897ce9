"""The Llama family's adapter: the generic one, with the type given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .transformers_adapter import TransformersAdapter


class LlamaAdapter(TransformersAdapter):
    """Adapter for Llama from its transformers config as a dict."""

    def __init__(self, config_dict: Mapping[str, Any]) -> None:
        super().__init__({**config_dict, "model_type": "llama"})
