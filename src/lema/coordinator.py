"""What the processes of one run settle together before they act.

Every rank asks the same questions in the same order, whatever it sees itself, so that no rank goes another way than the
others. A question's name says what it is about, for those who watch and for a rank that is asked another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class Coordinator:
    """A run of one process, which settles everything with itself; one of several overrides all of this."""

    rank = 0
    """This process's number; the first, 0, is the one that writes."""
    world_size = 1
    """How many processes there are."""

    def total(self, what: str, number: Number) -> Number:
        """The sum of the ranks' numbers."""
        return number

    def add(self, what: str, tensors: Sequence[Any]) -> None:
        """Replace tensors by their sums over the ranks, in place."""

    def agree(self, what: str, wish: T) -> T:
        """The first wish, by rank, that is not false; else this one. So what one rank wants, all do."""
        return wish

    def broadcast(self, what: str, value: T) -> T:
        """The first rank's value."""
        return value

    def abandon(self, what: str) -> None:
        """Tell ranks that wait for this one that it has left what they are in."""
