"""The original's module path of `LemaModel`, kept for its users."""

from ..model import LemaModel

__all__ = ["LemaModel"]
