"""`TokenDataset`: rows as token ids and labels of at most a given length, encoded when they are asked for.

It knows lengths and why a row is dropped; it knows nothing of the order of rows or of batches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from ..storage.cache import cache_folder, digest, write_whole
from .config import ON_BAD_ROW, TOO_LONG
from .render import EncodedRow
from .rows import FileChangedError, Rows

logger = logging.getLogger(__name__)

TOO_LONG_REASON = "too long"
NO_TARGET_REASON = "no target"
BAD_REASON = "bad"
REASONS = (TOO_LONG_REASON, NO_TARGET_REASON, BAD_REASON)
"""Why a row is dropped."""
_FATES = ("kept", "truncated", *REASONS)
_BAD_ROWS_NAMED = 5
_ANNOUNCED_ROWS = 5000
_SIZES_VERSION = 3
_SECONDS_SILENT = 30


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is left out."""

    reason: str
    """`too long`, `no target` or `bad`."""
    why: str = ""
    """Of a bad row: which it is, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class RowSizes:
    """What became of every row of a data set."""

    tokens: np.ndarray
    """int32 `[rows]`; 0 where it is dropped."""
    fates: np.ndarray
    """int32 `[rows]`: the number of a fate."""

    def count(self, fate: str) -> int:
        """Rows that are `kept`, `truncated`, or dropped for a reason."""
        return int((self.fates == _FATES.index(fate)).sum())


class TokenDataset:
    """Encoded rows by their number.

    Args:
        rows: raw rows.
        encoder: a row as ids and labels; its `key`, if it has one, says what its results depend on.
        max_seq_length: tokens a row may have.
        too_long: what happens to one with more: `truncate` (its end is cut), `drop` or `error`.
        on_bad_row: what happens to a row that cannot be used: `error` or `skip`.
    """

    def __init__(
        self,
        rows: Rows,
        encoder: Callable[[Mapping[str, Any]], EncodedRow],
        *,
        max_seq_length: int,
        too_long: str = "truncate",
        on_bad_row: str = "error",
    ) -> None:
        for name, value, known in (("too_long", too_long, TOO_LONG), ("on_bad_row", on_bad_row, ON_BAD_ROW)):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(known)}")
        if max_seq_length < 2:
            raise ConfigError(
                f"max_seq_length={max_seq_length} leaves nothing to learn: a target needs a token before it"
            )
        self.rows = rows
        self.max_seq_length = max_seq_length
        self.encoder = encoder
        self._too_long = too_long
        self._skips_bad = on_bad_row == "skip"
        self._named: set[int] = set()
        self._unused: set[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow | Dropped:
        """One row, at most `max_seq_length` tokens with at least one target, or why it is left out.

        Raises:
            InputError: a bad row, or one too long where that is an error; says which.
        """
        return self.measured(index)[0]

    def measured(self, index: int) -> tuple[EncodedRow | Dropped, int]:
        """One row as above, and the tokens it had before anything was cut."""
        try:
            encoded = self._encoded(index)
        except FileChangedError:
            raise
        except InputError as error:
            if not self._skips_bad:
                raise
            if index not in self._named and len(self._named) < _BAD_ROWS_NAMED:
                self._named.add(index)
                logger.warning("skipped: %s", error)
            return Dropped(BAD_REASON, str(error)), 0
        length = encoded.cut_from or len(encoded.input_ids)
        about = "about " if encoded.cut_from else ""
        if length > self.max_seq_length:
            if self._too_long == "error":
                raise InputError(
                    f"{self.rows.where(index)} has {about}{length} tokens, more than "
                    f"max_seq_length={self.max_seq_length}; raise that, or set too_long to truncate or drop"
                )
            if self._too_long == "drop":
                return Dropped(TOO_LONG_REASON), length
            encoded = encoded.cut(self.max_seq_length)
        return (encoded if encoded.num_targets else Dropped(NO_TARGET_REASON)), length

    def name_unused(self, fields: Iterable[str]) -> None:
        """Say which fields nothing reads; from now on another one is said with the first row that has it."""
        self._unused = {*fields}
        if self._unused:
            logger.warning("%s: fields that are not used: %s", self.rows.name, ", ".join(fields))

    def _encoded(self, index: int) -> EncodedRow:
        row = self.rows[index]
        try:
            encoded = self.encoder(row)
        except InputError as error:
            raise InputError(f"{self.rows.where(index)}: {error}") from error
        if self._unused is not None and (more := [name for name in encoded.unused if name not in self._unused]):
            self._unused.update(more)
            logger.warning("%s: fields that are not used: %s", self.rows.where(index), ", ".join(more))
        return encoded

    def sizes(self) -> RowSizes:
        """Tokens and fate of every row. All are encoded for it, once: the result is kept in the cache folder."""
        path = self._sizes_path()
        if path is not None and (found := _load_sizes(path, len(self))) is not None:
            return found
        if len(self) >= _ANNOUNCED_ROWS:
            logger.warning("packing: counting the tokens of all %d rows of %s, once", len(self), self.rows.name)
        pairs = np.zeros((2, len(self)), dtype=np.int32)
        said = time.monotonic()
        for index in range(len(self)):
            row = self[index]
            if time.monotonic() - said > _SECONDS_SILENT:
                said = time.monotonic()
                logger.warning("packing: %d of %d rows counted", index, len(self))
            if isinstance(row, Dropped):
                pairs[1, index] = _FATES.index(row.reason)
            else:
                pairs[:, index] = len(row.input_ids), _FATES.index("kept" if row.cut_from is None else "truncated")
        if path is not None:
            write_whole(path, lambda file: np.save(file, pairs, allow_pickle=False))
        return RowSizes(*pairs)

    def _sizes_path(self) -> Path | None:
        folder, key = cache_folder(), self.key
        if folder is None or key is None:
            return None
        fingerprint = self.rows.fingerprint
        what = [fingerprint.get(name) for name in ("sha256", "rows", "chosen", "columns")]
        return folder / f"lengths-{digest(_SIZES_VERSION, *what, key)}.npy"

    @property
    def key(self) -> str | None:
        """What encoded rows depend on besides the rows; None where the encoder cannot say."""
        key = getattr(self.encoder, "key", None)
        return None if key is None else digest(key, self.max_seq_length, self._too_long, self._skips_bad)


def _load_sizes(path: Path, rows: int) -> RowSizes | None:
    """Sizes from the cache; anything odd about them means that they are made again."""
    try:
        pairs = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return RowSizes(*pairs) if pairs.shape == (2, rows) and pairs.dtype == np.int32 else None
