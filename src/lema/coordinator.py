"""What the processes of one run settle together before they act; a single process settles it with itself.

Every rank asks the same questions in the same order, whatever it sees itself, so that no rank goes another way than the
others. A question's name says what it is about, for those who watch and for a rank that is asked another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class Coordinator(Protocol):
    """The ranks of a run."""

    @property
    def rank(self) -> int:
        """This process's number; the first, 0, is the one that writes."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""

    def total(self, what: str, number: Number) -> Number:
        """The sum of the ranks' numbers."""

    def add(self, what: str, tensors: Sequence[Any]) -> None:
        """Replace tensors by their sums over the ranks, in place."""

    def agree(self, what: str, wish: T) -> T:
        """The first wish, by rank, that is not false; else this one. So what one rank wants, all do."""

    def broadcast(self, what: str, value: T) -> T:
        """The first rank's value."""

    def abandon(self, what: str) -> None:
        """Tell ranks that wait for this one that it has left what they are in."""


class SingleProcess:
    """A run of one process: every answer is what was asked with."""

    rank, world_size = 0, 1

    def total(self, what: str, number: Number) -> Number:
        """The number itself."""
        return number

    def add(self, what: str, tensors: Sequence[Any]) -> None:
        """Nothing is to be added."""

    def agree(self, what: str, wish: T) -> T:
        """The wish itself."""
        return wish

    def broadcast(self, what: str, value: T) -> T:
        """The value itself."""
        return value

    def abandon(self, what: str) -> None:
        """Nobody waits."""
