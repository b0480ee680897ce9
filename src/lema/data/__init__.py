"""Rows -> chat text -> token batches with labels on the targets only.

This room knows text, tokenizers and rows; it knows nothing of weights, models or training.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import DataConfig

if TYPE_CHECKING:
    from .chat import ChatExample, encode_chat, read_jsonl
    from .dataset import Dropped, TokenDataset
    from .encode import RowEncoder
    from .load import Data, load_data
    from .render import ChatRenderer, EncodedRow
    from .rows import JsonlRows, ListRows, Rows, fingerprint_difference
    from .schema import detect_format
    from .sources import open_rows
    from .stream import BatchStream, StepBatch
    from .tensors import collate, collate_packed

__all__ = [
    "BatchStream", "ChatExample", "ChatRenderer", "Data", "DataConfig", "Dropped", "EncodedRow", "JsonlRows",
    "ListRows", "RowEncoder", "Rows", "StepBatch", "TokenDataset", "collate", "collate_packed", "detect_format",
    "encode_chat", "fingerprint_difference", "load_data", "open_rows", "read_jsonl",
]  # fmt: skip

_HOMES = {
    "chat": ("ChatExample", "encode_chat", "read_jsonl"),
    "tensors": ("collate", "collate_packed"),
    "dataset": ("Dropped", "TokenDataset"),
    "encode": ("RowEncoder",),
    "load": ("Data", "load_data"),
    "render": ("ChatRenderer", "EncodedRow"),
    "rows": ("JsonlRows", "ListRows", "Rows", "fingerprint_difference"),
    "schema": ("detect_format",),
    "sources": ("open_rows",),
    "stream": ("BatchStream", "StepBatch"),
}


def __getattr__(name: str) -> Any:
    """numpy and torch are imported with the first name that needs them: settings alone need neither."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names that are not imported yet are seen too."""
    return sorted({*globals(), *__all__})
