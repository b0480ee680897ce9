"""The original's path of `TripleBufferManager`; see `lema.streaming.memory`."""

from ..streaming.memory import TripleBufferManager

__all__ = ["TripleBufferManager"]
