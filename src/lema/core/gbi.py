"""The original's path of `GlobalBinaryIndex`; see `lema.storage.index`."""

from ..storage.index import GlobalBinaryIndex

__all__ = ["GlobalBinaryIndex"]
