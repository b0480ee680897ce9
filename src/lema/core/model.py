"""The original's path of `LemaModel`; see `lema.model`."""

from ..run.facade import LemaModel

__all__ = ["LemaModel"]
