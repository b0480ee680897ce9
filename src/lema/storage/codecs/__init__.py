"""Codecs: how a file's tensors become parameters. `base` is the seam, every format has a file, `formats` lists them."""

from .base import Codec, Format, Piece, Placement, Run, Stored

__all__ = ["Codec", "Format", "Piece", "Placement", "Run", "Stored"]
