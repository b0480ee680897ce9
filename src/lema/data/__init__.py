"""Rows -> chat text -> token batches with labels on the targets only.

This room knows text, tokenizers and rows; it knows nothing of weights, models or training.
"""

from .chat import ChatExample, collate, encode_chat, read_jsonl

__all__ = ["ChatExample", "collate", "encode_chat", "read_jsonl"]
