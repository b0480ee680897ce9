"""LEMA, Layer-wise Efficient Memory Abstraction: fine-tune language models on hardware too small to hold them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .engine.runner import train_by

if TYPE_CHECKING:
    from .config import LemaConfig, MemoryStrategy
    from .engine.trainer import LemaTrainer
    from .model import LemaModel
    from .training.result import TrainResult

__version__ = "0.1.0"
__all__ = ["LemaConfig", "LemaModel", "LemaTrainer", "MemoryStrategy", "__version__"]
_WHERE = {"LemaConfig": "config", "MemoryStrategy": "config", "LemaModel": "model", "LemaTrainer": "engine.trainer"}


def __getattr__(name: str) -> Any:
    """pydantic, torch and transformers are imported with the first name that needs them."""
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    if name == "config":
        return import_module(".config", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _train(trainer: LemaTrainer, *data: Any, **options: Any) -> TrainResult:
    from .run.training import train_with

    return train_with(trainer, *data, **options)


train_by(_train)


def __dir__() -> list[str]:
    """Names that are not imported yet are seen too."""
    return sorted({*globals(), *__all__})
