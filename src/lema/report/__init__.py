"""The HTML page of a run: what its folder's files say, drawn in one file that needs nothing else.

A run folder's files are all that is read, whatever wrote them.
"""

from .page import write_report

__all__ = ["write_report"]
