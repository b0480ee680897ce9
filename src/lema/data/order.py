"""The order of rows: a pure function of seed and epoch, the same on every machine.

It knows numbers of rows; it knows nothing of rows, batches' contents or where a run is.

Permutations come from a bit generator's raw output, which numpy keeps the same for ever, and not from its
`permutation`, which it may change; a run resumed after an upgrade must find its rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_HELD_OUT = 0x6576616C  # a stream of its own, so that the split is not the first epoch's order
_STEPS_SORTED = 64
"""Steps whose rows are sorted by length together: enough to find rows of a length, few enough to stay random."""


def permutation(count: int, *key: int) -> np.ndarray:
    """int64 `[count]`: the numbers 0..count-1 in an order that only the key decides."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


def epoch_order(
    count: int, seed: int, epoch: int, *, shuffle: bool, rows_per_step: int, lengths: Callable[[], np.ndarray] | None
) -> np.ndarray:
    """int64 `[count]`: the rows of an epoch, each once.

    Args:
        lengths: of rows, to put rows of a length into the same step; None: no grouping.
    """
    if not shuffle:
        return np.arange(count, dtype=np.int64)
    order = permutation(count, seed, epoch)
    if lengths is None:
        return order
    runs = np.arange(count) // (rows_per_step * _STEPS_SORTED)
    order = order[np.lexsort((lengths()[order], runs))]
    full = count // rows_per_step  # the last step, if not full, stays the last
    steps = permutation(full, seed, epoch, 1)
    grouped = order[: full * rows_per_step].reshape(full, rows_per_step)[steps].reshape(-1)
    return np.concatenate((grouped, order[full * rows_per_step :]))


def split(count: int, eval_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, each in ascending order, none in both."""
    order = permutation(count, seed, _HELD_OUT)
    return np.sort(order[eval_rows:]), np.sort(order[:eval_rows])
