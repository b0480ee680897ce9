"""Preparing: any checkpoint of a causal language model into a transformers folder that streams well.

This room stands on core, models and utils; it knows nothing of training, adapters or devices.
"""

from .job import prepare
from .result import Prepared

__all__ = ["Prepared", "prepare"]
