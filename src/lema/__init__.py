"""LEMA, Layer-wise Efficient Memory Abstraction: fine-tune language models on hardware too small to hold them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import LemaConfig, MemoryStrategy

if TYPE_CHECKING:
    from .run.facade import LemaModel, LemaTrainer

__version__ = "0.1.0"
__all__ = ["LemaConfig", "LemaModel", "LemaTrainer", "MemoryStrategy", "__version__"]


def __getattr__(name: str) -> Any:
    """torch and transformers are imported with the first name that needs them."""
    if name in ("LemaModel", "LemaTrainer"):
        return getattr(importlib.import_module(".run.facade", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names that are not imported yet are seen too."""
    return sorted({*globals(), *__all__})
