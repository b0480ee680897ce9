"""The original's path of `LemaModel`; see `lema.model`."""

from ..model import LemaModel

__all__ = ["LemaModel"]
