"""The HTML page of a run: what its folder's files say, drawn in one file that needs nothing else.

This room reads the files of a run folder only; it knows nothing of models, weights or training.
"""

from .page import write_report

__all__ = ["write_report"]
