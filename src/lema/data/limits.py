"""What a model can take: token ids below its vocabulary, and as many as it has positions.

It knows encoded rows and two numbers; it knows nothing of models. Rows are held against them one by one as they are
encoded, so whoever looks at a row, a check before the start or the step itself, is told the same with its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import ConfigError, InputError
from ..storage.cache import digest
from .render import EncodedRow


@dataclass(frozen=True)
class ModelLimits:
    """Of a model whose rows are made here; None: no limit is known."""

    vocabulary: int | None = None
    """Ids are below it."""
    positions: int | None = None
    """Tokens of a row at most."""

    def check_length(self, max_seq_length: int) -> None:
        """`ConfigError` where rows may have more tokens than the model has positions."""
        if self.positions is not None and max_seq_length > self.positions:
            raise ConfigError(
                f"max_seq_length={max_seq_length} is more than the model's {self.positions} positions; lower it"
            )

    def padding(self, candidates: Iterable[int | None]) -> int:
        """The first of these ids that the model has, else 0: padding is masked, so any will do."""
        return next((i for i in candidates if i is not None and self._has(i)), 0)

    def _has(self, token: int) -> bool:
        return token >= 0 and (self.vocabulary is None or token < self.vocabulary)


class Within:
    """An encoder whose rows are refused where the model lacks one of their tokens.

    Args:
        encoder: with `renderer` and `key`; see `RowEncoder`.
    """

    def __init__(self, encoder: Any, limits: ModelLimits) -> None:
        self._encoder: Callable[[Mapping[str, Any]], EncodedRow] = encoder
        self._limits = limits
        self.renderer = encoder.renderer

    @cached_property
    def key(self) -> str:
        """The encoder's, and the vocabulary where rows can be refused for it."""
        key: str = self._encoder.key  # type: ignore[attr-defined]
        vocabulary = self._limits.vocabulary
        beyond = vocabulary is not None and max(self.renderer.tokenizer.get_vocab().values(), default=0) >= vocabulary
        return digest(key, vocabulary) if beyond else key

    def __call__(self, row: Mapping[str, Any]) -> EncodedRow:
        """The row's ids and labels; `InputError` names the first token that the model has not."""
        encoded = self._encoder(row)
        vocabulary = self._limits.vocabulary
        if vocabulary is not None and encoded.input_ids and max(encoded.input_ids) >= vocabulary:
            at, token = next((at, i) for at, i in enumerate(encoded.input_ids) if i >= vocabulary)
            text = self.renderer.tokenizer.convert_ids_to_tokens(token)
            raise InputError(
                f"token {at} is {token} ({text!r}), outside the model's vocabulary of {vocabulary} tokens "
                f"(0..{vocabulary - 1}); is this the model's own tokenizer?"
            )
        return encoded
