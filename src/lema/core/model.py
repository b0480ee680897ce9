"""The original's path of `LemaModel`; see `lema.run.facade`."""

from ..run.facade import LemaModel

__all__ = ["LemaModel"]
