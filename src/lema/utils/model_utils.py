"""The original's path of its conversion; see `lema.prepare.single_file`."""

from ..prepare.single_file import break_shared_weights, prepare_monolithic_safetensors

__all__ = ["break_shared_weights", "prepare_monolithic_safetensors"]
