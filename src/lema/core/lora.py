"""The original's path of `LoRAManager`; see `lema.models.lora`."""

from ..models.lora import LoRAManager

__all__ = ["LoRAManager"]
