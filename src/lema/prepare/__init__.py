"""Preparing: any checkpoint of a causal language model into a transformers folder that streams well.

Stands on `storage` and `models`. Adapters, devices and training have no part in it.
"""

from .job import prepare
from .result import Prepared

__all__ = ["Prepared", "prepare"]
