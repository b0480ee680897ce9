"""LEMA, Layer-wise Efficient Memory Abstraction: fine-tune language models on hardware too small to hold them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LemaConfig, MemoryStrategy
    from .pretrained import close, from_pretrained
    from .run.facade import LemaModel, LemaTrainer

__version__ = "0.1.0"
__all__ = ["LemaConfig", "LemaModel", "LemaTrainer", "MemoryStrategy", "__version__", "close", "from_pretrained"]
_WHERE = {
    "LemaConfig": "config", "MemoryStrategy": "config", "LemaModel": "run.facade", "LemaTrainer": "run.facade",
    "from_pretrained": "pretrained", "close": "pretrained",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """pydantic, torch and transformers are imported with the first name that needs them."""
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    if name == "config":
        return import_module(".config", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names that are not imported yet are seen too."""
    return sorted({*globals(), *__all__})
