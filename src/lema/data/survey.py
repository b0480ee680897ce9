"""What a data set looks like once encoded: counts, lengths, what is learned, bad rows.

It knows encoded rows and why some are not; it knows nothing of how any of it is shown.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .dataset import BAD_REASON, Dropped, TokenDataset
from .render import IGNORE, EncodedRow

_BAD_ROWS_KEPT = 20
_BINS = 12
_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


@dataclass
class Survey:
    """Counts over rows looked at."""

    rows: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    """Rows whose tokens and labels are those of one before."""
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    """What is wrong with the first bad ones, with their places; those that are skipped too."""
    tokens: int = 0
    """Of rows kept, after truncation."""
    targets: int = 0
    ended: int = 0
    """Rows kept whose last learned tokens include one of the tokenizer's special tokens."""
    whole: int = 0
    """Rows kept that were not truncated."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row that could be encoded, before truncation."""
    unused: Counter[str] = field(default_factory=Counter)
    """Fields that nothing reads, with the number of rows kept that have each."""
    example: tuple[int, EncodedRow] | None = None
    """The first row kept, with its number."""

    def name_bad(self, words: str) -> None:
        """Keep what is wrong with one of the first bad rows."""
        if len(self.bad_rows) < _BAD_ROWS_KEPT:
            self.bad_rows.append(words)

    @property
    def kept(self) -> int:
        """Rows that are learned from."""
        return self.rows - self.bad - self.dropped.total()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; lengths in tokens, shares from 0 to 1."""
        lengths = np.array(self.lengths, dtype=np.int64)
        return {
            "rows": self.rows, "kept": self.kept, "truncated": self.truncated, "dropped": dict(self.dropped),
            "duplicates": self.duplicates, "bad": self.bad, "bad_rows": self.bad_rows,
            "unused_fields": dict(self.unused.most_common()), "tokens": self.tokens,
            "trained_tokens": self.targets, "trained_share": self.targets / self.tokens if self.tokens else 0.0,
            "end_learned_share": self.ended / self.whole if self.whole else 0.0,
            "length_mean": float(lengths.mean()) if lengths.size else 0.0,
            "length_percentiles": {
                str(p): int(np.percentile(lengths, p, method="higher")) for p in _PERCENTILES if lengths.size
            },
            "length_histogram": _histogram(lengths),
        }  # fmt: skip


def survey(dataset: TokenDataset, indices: Iterable[int]) -> Survey:
    """Look at rows by their numbers; bad ones are counted and noted, not raised."""
    found = Survey()
    tokenizer = getattr(getattr(dataset.encoder, "renderer", None), "tokenizer", None)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} if tokenizer is not None else set()
    seen: set[bytes] = set()
    for index in indices:
        found.rows += 1
        try:
            row, length = dataset.measured(index)
        except InputError as error:
            found.bad += 1
            found.name_bad(str(error))
            continue
        if isinstance(row, Dropped):
            found.dropped[row.reason] += 1
            if row.reason == BAD_REASON:
                found.name_bad(row.why)
            else:
                found.lengths.append(length)
            continue
        found.lengths.append(length)
        found.unused.update(row.unused)
        found.truncated += row.cut_from is not None
        found.tokens += len(row.input_ids)
        found.targets += row.num_targets
        if row.cut_from is None:
            found.whole += 1
            learned = [label for label in row.labels[1:] if label != IGNORE]
            found.ended += any(label in special for label in learned[-3:])
        mark = hashlib.blake2b(np.array([row.input_ids, row.labels]).tobytes(), digest_size=8).digest()
        found.duplicates += mark in seen
        seen.add(mark)
        if found.example is None:
            found.example = (index, row)
    return found


def segments(tokenizer: Any, row: EncodedRow) -> list[tuple[str, bool]]:
    """A row's text in runs of tokens, each with whether it is learned."""
    runs: list[tuple[list[int], bool]] = []
    for position, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
        learned = label != IGNORE and position > 0
        if not runs or runs[-1][1] != learned:
            runs.append(([], learned))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens, clean_up_tokenization_spaces=False), learned) for tokens, learned in runs]


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Up to a dozen bins of a round width: from (inclusive), to (exclusive), rows."""
    if not lengths.size:
        return []
    low, top = int(lengths.min()), int(lengths.max()) + 1
    width = next(w * 10**e for e in range(12) for w in (1, 2, 5) if w * 10**e * _BINS >= top - low)
    first = low // width
    counts = np.bincount(lengths // width - first)
    return [{"from": (first + i) * width, "to": (first + i + 1) * width, "rows": int(n)} for i, n in enumerate(counts)]
