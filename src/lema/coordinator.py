"""What the processes of one run settle together before they act.

Every rank asks the same questions in the same order, whatever it sees itself, so that no rank goes another way than the
others. A question's name says what it is about, for those who watch and for a rank that is asked another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class StepAbandoned(BaseException):
    """What is under way is left, and what it made is dropped: by a second signal, for want of time, or because another
    rank has left it.

    Not an `Exception`: nobody in between is to handle it.
    """


class Coordinator:
    """A run of one process, which settles everything with itself; one of several overrides all of this.

    Every question but `abandon` and `fail` waits for the other ranks. Where one of these has left what they are in, the
    wait ends by `StepAbandoned`, and where one has failed, by `RankError`.
    """

    rank = 0
    """This process's number."""
    world_size = 1
    """How many processes there are."""

    @property
    def is_writer(self) -> bool:
        """Whether this process writes what the run leaves behind: the first one does."""
        return self.rank == 0

    def totals(self, what: str, numbers: Sequence[Number]) -> list[Number]:
        """Each number summed over the ranks."""
        return list(numbers)

    def add(self, what: str, tensors: Sequence[Any]) -> None:
        """Replace tensors by their sums over the ranks, in place."""

    def agree(self, what: str, wish: T) -> T:
        """The first wish, by rank, that is not false; else this one. So what one rank wants, all do."""
        return wish

    def broadcast(self, what: str, value: T) -> T:
        """The first rank's value."""
        return value

    def found_by_first(self, what: str, find: Callable[[], T]) -> T:
        """What the first rank finds, or why it finds nothing, for all; the others do not look."""
        try:
            found = find() if self.is_writer else None
        except BaseException as error:
            self.fail(error)
            raise
        found = self.broadcast(what, found)
        assert found is not None  # the first rank's
        return found

    def meet(self, what: str) -> None:
        """Return when all ranks are here."""

    def abandon(self, what: str) -> None:
        """Leave what the ranks are in, and return when all have left it."""

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one has ended by an error, and wait for none."""
