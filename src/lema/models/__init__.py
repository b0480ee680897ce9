"""A model as an ordered list of streamed units and a rest that stays; adapters by model type.

This room knows transformers' models and which file tensors fill them. It knows nothing of sweeps,
losses or optimizers.
"""

from .base import LemaModelAdapter
from .gpt2 import GPT2Adapter
from .llama import LlamaAdapter
from .registry import get_adapter, register_adapter
from .transformers_adapter import TransformersAdapter

__all__ = [
    "GPT2Adapter",
    "LemaModelAdapter",
    "LlamaAdapter",
    "TransformersAdapter",
    "get_adapter",
    "register_adapter",
]
