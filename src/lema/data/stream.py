"""`BatchStream`: the batches of a run, step after step, and where in them it is.

It knows order, packs and counts; it knows nothing of what is done with a batch.

The rows of a step are a function of (seed, epoch, step) alone, so the cursor is two numbers: a stream that loads it
goes on as one that never stopped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError, InputError
from .dataset import REASONS, Dropped, TokenDataset
from .order import epoch_order
from .packing import Packs, pack
from .render import EncodedRow
from .rows import fingerprint_difference
from .tensors import Tensors, collate, collate_packed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepBatch:
    """What one step learns from."""

    inputs: Tensors
    """input_ids, labels and attention_mask, or position_ids where packed, each `[rows, seq]`; empty where every row of
    the step was dropped."""
    rows: int
    """Rows of the data set in it."""
    tokens: int
    """Without padding."""
    targets: int
    """Tokens that are predicted."""
    dropped: int
    """Rows of this step left out."""
    truncated: int
    """Rows of this step cut to `max_seq_length`."""
    epoch: float
    """Epochs done after this step."""
    indices: list[int] = field(default_factory=list)
    """Numbers of its rows in the data set."""


class BatchStream:
    """Batches, epoch after epoch without end, or one epoch each time it is iterated over.

    Args:
        dataset: encoded rows.
        rows_per_step: rows of a step; where packed, packs.
        seed: of the order.
        pad_token_id: any token; its positions are masked and never learned.
        shuffle: another order in each epoch; else that of the data set.
        group_by_length: rows of similar length in bytes into the same step.
        packing: lay rows one after the other up to the data set's `max_seq_length`.
        padding_side: `right` or `left`.
        max_dropped: share of rows that may be dropped.
        repeat: go on with the next epoch; False: end after one, and begin with it anew when iterated over again.

    Raises:
        InputError: (from `next` too) more rows are dropped than allowed, or a row is bad.
    """

    def __init__(
        self, dataset: TokenDataset, rows_per_step: int, seed: int = 0, *, pad_token_id: int = 0, shuffle: bool = True,
        group_by_length: bool = False, packing: bool = False, padding_side: str = "right", max_dropped: float = 1.0,
        repeat: bool = True,
    ) -> None:  # fmt: skip
        if rows_per_step < 1 or padding_side not in ("left", "right"):
            raise ConfigError(
                f"rows_per_step={rows_per_step} must be 1 or more, and padding_side={padding_side!r} a side"
            )
        self.dataset = dataset
        self.rows_per_step = rows_per_step
        self.packing = packing
        self._seed = seed
        self._pad = pad_token_id
        self._shuffle = shuffle
        self._grouped = group_by_length
        self._side = padding_side
        self._max_dropped = max_dropped
        self._repeat = repeat
        self._reported = False
        self._first_bad = ""
        self._packs: Packs | None = None
        self._lost_in_packing: Counter[str] = Counter()
        if packing:
            self._packs = self._make_packs()
        self._epoch = 0
        self._step = 0
        self._order: np.ndarray | None = None
        self.counts: Counter[str] = Counter(self._lost_in_packing)
        """Of the epoch so far: rows seen, truncated, and dropped for each reason (`too long`, `no target`, `bad`)."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch, exactly."""
        return -(-self._units // self.rows_per_step)

    @property
    def packs(self) -> int | None:
        """Packs of an epoch; None where rows are not packed."""
        return None if self._packs is None else len(self._packs)

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self._epoch + self._step / self.steps_per_epoch

    def __iter__(self) -> BatchStream:
        if not self._repeat:
            self._begin(0)
        return self

    def __next__(self) -> StepBatch:
        if self._step == self.steps_per_epoch:
            if not self._repeat:
                raise StopIteration
            self._begin(self._epoch + 1)
        if self._order is None:
            self._order = epoch_order(
                self._units, self._seed, self._epoch, shuffle=self._shuffle, rows_per_step=self.rows_per_step,
                lengths=(lambda: self.dataset.rows.byte_lengths) if self._grouped else None,
            )  # fmt: skip
        chosen = self._order[self._step * self.rows_per_step : (self._step + 1) * self.rows_per_step]
        batch = self._batch(chosen)
        if self._step == self.steps_per_epoch:
            self.report()
        return batch

    def _begin(self, epoch: int) -> None:
        self._epoch, self._step, self._order = epoch, 0, None
        self.counts = Counter(self._lost_in_packing)

    @property
    def _units(self) -> int:
        """What the order is of: rows, or packs."""
        return len(self.dataset) if self._packs is None else len(self._packs)

    def _batch(self, chosen: np.ndarray) -> StepBatch:
        members = [[int(i)] for i in chosen] if self._packs is None else [self._packs[i].tolist() for i in chosen]
        kept: list[list[EncodedRow]] = []
        counts: Counter[str] = Counter()
        for numbers in members:
            rows = []
            for number in numbers:
                row = self.dataset[number]
                counts["rows"] += 1
                if isinstance(row, Dropped):
                    counts[row.reason] += 1
                    self._first_bad = self._first_bad or row.why
                    continue
                counts["truncated"] += row.cut_from is not None
                rows.append(row)
            if rows:
                kept.append(rows)
        self._step += 1
        self.counts += counts
        self._check_dropped()
        inputs: Tensors = {}
        if kept and self._packs is not None:
            inputs = collate_packed(kept, self._pad)
        elif kept:
            inputs = collate([row for rows in kept for row in rows], self._pad, self._side)
        every = [row for rows in kept for row in rows]
        return StepBatch(
            inputs, len(every), sum(len(row.input_ids) for row in every), sum(row.num_targets for row in every),
            _dropped(counts), counts["truncated"], self.epoch, [number for numbers in members for number in numbers],
        )  # fmt: skip

    # -- rows that are lost ----------------------------------------------------------------------

    def _make_packs(self) -> Packs:
        sizes = self.dataset.sizes()
        for reason in REASONS:
            if lost := sizes.count(reason):
                self._lost_in_packing[reason] = lost
        self._lost_in_packing["rows"] = self._lost_in_packing.total()
        self._refuse_above(self._lost_in_packing, len(self.dataset))
        return pack(sizes.tokens, self.dataset.max_seq_length)

    def _check_dropped(self) -> None:
        """Stop as soon as it is beyond doubt that too many rows are dropped, exactly at the end of the epoch."""
        if self._packs is not None:
            return  # decided exactly when the packs were made
        seen = self.counts["rows"]
        # Three standard deviations of chance, until all rows are seen.
        slack = 0.0 if self._step == self.steps_per_epoch else 3 * (self._max_dropped * seen) ** 0.5
        if seen >= min(100, len(self.dataset)):
            self._refuse_above(self.counts, seen, slack)

    def _refuse_above(self, counts: Mapping[str, int], seen: int, slack: float = 0.0) -> None:
        dropped = _dropped(counts)
        nothing_left = seen == len(self.dataset) and dropped == seen
        if not nothing_left and dropped <= self._max_dropped * seen + slack:
            return
        why = "nothing is left to learn" if nothing_left else f"more than max_dropped={self._max_dropped:g} allows"
        raise InputError(
            f"{self.dataset.rows.name}: {dropped} of {seen} rows ({dropped / seen:.1%}) are dropped "
            f"({_reasons(counts)}), {why}; raise max_seq_length (now {self.dataset.max_seq_length}), look at "
            "`lema data check`" + ("" if nothing_left else ", or raise max_dropped")
            + (f". The first bad row: {self._first_bad}" if self._first_bad else "")
        )  # fmt: skip

    def check_dropped(self, counts: Mapping[str, int], seen: int) -> None:
        """`InputError` where so many rows, for these reasons, are more than may be dropped of those seen."""
        self._refuse_above(counts, seen)

    def report(self) -> None:
        """Say loudly what the epoch so far left out; of evaluation, whose epochs are all the same, once."""
        dropped, truncated, seen = _dropped(self.counts), self.counts["truncated"], self.counts["rows"]
        if self._reported or not (dropped or truncated):
            return
        self._reported = not self._repeat
        logger.warning(
            "%s, %s: of %d rows %d (%.1f%%) were truncated to %d tokens and %d (%.1f%%) dropped%s",
            self.dataset.rows.name, f"epoch {self._epoch + 1}" if self._repeat else "evaluation", seen, truncated,
            100 * truncated / seen, self.dataset.max_seq_length, dropped, 100 * dropped / seen,
            f" ({_reasons(self.counts)})" if dropped else "",
        )  # fmt: skip

    # -- the cursor ------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Which rows these are, and in which order: JSON-ready."""
        return {"order": self._order_facts(), "data": self.dataset.rows.fingerprint, "encoding": self.dataset.key}

    def check_identity(self, stored: Mapping[str, Any]) -> None:
        """Compare with the identity a checkpoint stored.

        Raises:
            CheckpointError: it is damaged, or of another data set or another order.
        """
        try:
            order = stored["order"]
            difference = fingerprint_difference(stored["data"], self.dataset.rows.fingerprint)
            changed = [
                f"{k}: {order.get(k)} then, {v} now" for k, v in self._order_facts().items() if order.get(k) != v
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the data cursor of the checkpoint is damaged: {error!r}") from error
        if difference is not None:
            use = "trained" if self._repeat else "evaluated"
            raise CheckpointError(
                f"{self.dataset.rows.name} is not the data the checkpoint was {use} on: {difference}; give the data "
                "it was, or start a new run"
            )
        if changed:
            raise CheckpointError(f"the checkpoint took its rows in another order: {'; '.join(changed)}")

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and of which order: JSON-ready."""
        return {"epoch": self._epoch, "step": self._step, "counts": dict(self.counts), **self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            CheckpointError: the state is damaged, or of another data set or another order.
        """
        try:
            epoch, step = int(state["epoch"]), int(state["step"])
            counts = Counter({str(name): int(number) for name, number in state["counts"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the data cursor of the checkpoint is damaged: {error!r}") from error
        self.check_identity(state)
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise CheckpointError(f"the data cursor says step {step} of {self.steps_per_epoch} in epoch {epoch}")
        if state.get("encoding") != self.dataset.key:
            logger.warning(
                "tokenizer, chat template or data settings changed since the checkpoint: rows read otherwise"
            )
        self._begin(epoch)
        self._step, self.counts = step, counts

    def _order_facts(self) -> dict[str, Any]:
        how = "length" if self._grouped else "shuffle" if self._shuffle else "file"
        return {"seed": self._seed, "rows_per_step": self.rows_per_step, "order": how, "packing": self.packing,
                "steps_per_epoch": self.steps_per_epoch}  # fmt: skip


def _dropped(counts: Mapping[str, int]) -> int:
    return sum(counts.get(reason, 0) for reason in REASONS)


def _reasons(counts: Mapping[str, int]) -> str:
    found = [f"{counts[reason]} {reason}" for reason in REASONS if counts.get(reason)]
    return ", ".join(found)
