"""Several ranks of one run as threads of this process, and runs over them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import lema
from lema.coordinator import Coordinator, StepAbandoned
from lema.errors import RankError
from lema.training.run import RunData
from lema.training.run_config import RunConfig
from training_runs import batches_of

T = TypeVar("T")
PATIENCE = 120.0
"""Seconds after which a rank that waits for another takes it for gone."""


class Group:
    """Ranks that meet at every question; that two of them ask different ones is an error of both."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[str] = []
        self._changed = threading.Condition()
        self._given: dict[int, tuple[str, Any]] = {}
        self._answers: dict[int, list[Any]] = {}
        self._left: set[int] = set()
        self._times_left = 0
        self._over: str | None = None

    def exchange(self, rank: int, what: str, value: Any) -> list[Any]:
        """The values of all ranks."""
        with self._changed:
            self._check()
            number = len(self.asked)
            self._given[rank] = what, value
            if len(self._given) == self.size:
                questions = {question for question, _ in self._given.values()}
                if len(questions) > 1:
                    self._end(f"ranks have parted: they ask {sorted(questions)}")
                self._answers[number] = [self._given[other][1] for other in range(self.size)]
                self._given.clear()
                self.asked.append(what)
                self._changed.notify_all()
            while len(self.asked) == number:
                try:
                    self._check()
                except StepAbandoned:
                    del self._given[rank]
                    raise
                self._wait(what)
            return self._answers[number]

    def abandon(self, rank: int) -> None:
        """Wait until all have left."""
        with self._changed:
            number = self._times_left
            self._left.add(rank)
            if len(self._left) == self.size:
                self._left.clear()
                self._times_left += 1
            self._changed.notify_all()
            while self._times_left == number:
                if self._over is not None:
                    raise RankError(self._over)
                self._wait("leave")

    def fail(self, rank: int, error: BaseException) -> None:
        """End the others' waiting."""
        with self._changed:
            self._over = self._over or f"rank {rank} has ended: {type(error).__name__}: {error}"
            self._changed.notify_all()

    def _check(self) -> None:
        if self._over is not None:
            raise RankError(self._over)
        if self._left:
            raise StepAbandoned

    def _wait(self, what: str) -> None:
        if not self._changed.wait(PATIENCE):
            self._end(f"a rank waited in vain for the others: {what}")

    def _end(self, why: str) -> None:
        self._over = why
        self._changed.notify_all()
        raise AssertionError(why)


class Member(Coordinator):
    """One rank of a group."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank, self.world_size = group, rank, group.size

    def totals(self, what: str, numbers: Sequence[Any]) -> list[Any]:
        return [sum(values) for values in zip(*self.group.exchange(self.rank, what, list(numbers)), strict=True)]

    def add(self, what: str, tensors: Sequence[Any]) -> None:
        for own, *given in zip(
            tensors, *self.group.exchange(self.rank, what, [t.clone() for t in tensors]), strict=True
        ):
            own.copy_(sum(given))

    def agree(self, what: str, wish: T) -> T:
        return next((other for other in self.group.exchange(self.rank, what, wish) if other), wish)

    def broadcast(self, what: str, value: T) -> T:
        first: T = self.group.exchange(self.rank, what, value)[0]
        return first

    def meet(self, what: str) -> None:
        self.group.exchange(self.rank, what, None)

    def abandon(self, what: str) -> None:
        self.group.abandon(self.rank)

    def fail(self, error: BaseException) -> None:
        self.group.fail(self.rank, error)


class Dealt:
    """A rank's part of a stream: of each batch every n-th row, or every n-th batch."""

    def __init__(self, stream: Any, rank: int, size: int, by_batch: bool = False) -> None:
        self._stream, self._rank, self._size, self._by_batch = stream, rank, size, by_batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._stream):
            if not self._by_batch:
                yield self._rows_of(batch)
            elif number % self._size == self._rank:
                yield batch

    def _rows_of(self, batch: Any) -> Any:
        inputs = {name: value[self._rank :: self._size] for name, value in batch.inputs.items()}
        first = self._rank == 0
        counted = {
            "targets": int((inputs["labels"][:, 1:] != -100).sum()) if inputs else 0,
            "tokens": int(inputs["attention_mask"].sum()) if inputs else 0,
            "dropped": batch.dropped if first else 0, "truncated": batch.truncated if first else 0,
        }  # fmt: skip
        return dataclasses.replace(batch, inputs=inputs, **counted)


def train_on(
    size: int, settings: dict[str, Any], *, prepare: Callable[[Any, int], None] = lambda trainer, rank: None,
    callbacks: Callable[[int], Sequence[Any]] = lambda rank: (), main: int = 0, resume: str | None = None,
) -> tuple[list[Any], list[list[Any]], Group]:  # fmt: skip
    """One run on several ranks: what came of it on each, a result or an error; their adapters; and the group.

    Args:
        main: the rank that runs in the main thread, where signals come.
    """
    group, run = Group(size), RunConfig.from_dict(settings)
    models = [lema.LemaModel(run.lema) for _ in range(size)]
    trainers, data = [model.get_trainer() for model in models], [batches_of(settings) for _ in range(size)]
    outcome: list[Any] = [None] * size

    def train(rank: int) -> None:
        parts = data[rank]
        dealt = RunData(
            Dealt(parts.train, rank, size), parts.eval and Dealt(parts.eval, rank, size, by_batch=True), parts.summary
        )
        try:
            outcome[rank] = trainers[rank].train(
                dealt, training=run.training, data=run.data, callbacks=callbacks(rank), resume=resume, plain=True
            )
        except (Exception, StepAbandoned) as error:
            outcome[rank] = error

    for rank, trainer in enumerate(trainers):
        trainer.coordinator = Member(group, rank)
        prepare(trainer, rank)
    others = [threading.Thread(target=train, args=(rank,), name=f"rank {rank}") for rank in range(size) if rank != main]
    for thread in others:
        thread.start()
    train(main)
    for thread in others:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a rank hangs"
    adapters = [[p.detach().clone() for p in model.get_trainable_parameters()] for model in models]
    for model in models:
        model.close()
    return outcome, adapters, group
