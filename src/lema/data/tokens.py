"""`Tokens`: texts as token ids, cut where somebody else will cut them too.

It knows a tokenizer and characters; it knows nothing of messages or labels.

Tokens are not letters: the last ones of a prompt are others once an answer follows, if a token can reach over the
border (a line end and an empty line after it, say). A model that is asked with the prompt alone would meet tokens that
training never showed. So the tokens before such a border are those of the prompt alone, and the rest is tokenized as
what follows something else.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ..errors import InputError
from .checks import check_whole_characters
from .prefix import Encoded

_ANCHORS = ("\n", "a", ".", " ")  # what a continuation may be tokenized after: the first that no token reaches out of
_REACH = 1024
"""Characters; no token, and no merge on the way to one, depends on what is half as far away: see `prefix`."""
_ALIKE = 16
_END_AMONG = 3  # last tokens of a text: a line end or two may come after the end token


class Tokens:
    """A tokenizer's ids of texts.

    Args:
        tokenizer: a fast one of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.cuts = 0
        """Borders so far that a token would have reached over."""

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of special and added tokens."""
        return frozenset((*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder))

    def of(self, text: str) -> Encoded:
        """Ids of a text as it is."""
        return self._encoded(text, add_special_tokens=False)

    def begun(self, text: str) -> Encoded:
        """Ids of a text as a row or a prompt begins, with what the tokenizer puts before it, and nothing after it.

        A text that begins with the token that the tokenizer puts there, however often, has it once.
        """
        ids, offsets = self._encoded(text)
        first, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        while first is not None and ids[:2] == [first, first] and text.startswith(self._tokenizer.bos_token):
            ids, offsets = ids[1:], offsets[1:]
        added = [end] if not text.endswith(self._tokenizer.eos_token or "\0") else [end, end]
        if len(ids) > 1 and end is not None and ids[-len(added) :] == added:
            ids, offsets = ids[:-1], offsets[:-1]
        return ids, offsets

    def before_word(self, text: str) -> list[int]:
        """Ids of a text that an answer follows: at its end white space is cut otherwise than before a word."""
        ids, offsets = self.begun(text + "a")
        return [token for token, (_, end) in zip(ids, offsets) if end <= len(text)]

    def cut(self, text: str, borders: Sequence[int]) -> Encoded:
        """Ids of a text in which those before each border are those that the text up to it has for itself."""
        ids, offsets = self.of(text)
        start = at = 0  # the character and the token after the last cut
        for border in sorted({place for place in borders if 0 < place < len(text)}):
            before = bisect_right(offsets, border, lo=at, key=_end)
            first, alone = self._alone(text, (ids, offsets), (start, at), (border, before))
            clean = before == len(ids) or offsets[before][0] >= border
            if clean and alone[0] == ids[first:before]:
                continue
            self.cuts += 1
            after, rest = self._behind(text, (ids, offsets), (border, before))
            ids[first:after] = alone[0] + rest[0]
            offsets[first:after] = alone[1] + rest[1]
            start, at = border, first + len(alone[0])
        return ids, offsets

    def _alone(
        self, text: str, whole: Encoded, cut: tuple[int, int], border: tuple[int, int]
    ) -> tuple[int, Encoded]:  # fmt: skip
        """The tokens before a border that the text up to it has for itself, but for those that stay whatever follows.

        Args:
            whole: the tokens of the text.
            cut: the character and the token that begin behind the last cut.
            border: the border, and how many tokens end before it.

        Returns:
            How many tokens stay, and those that follow them.
        """
        ids, offsets = whole
        for first in range(border[1] - 1, cut[1], -1):
            begin = offsets[first][0]
            if ids[first] in self.special:
                return first, self._piece(text, begin, border[0])
            if border[0] - begin >= _REACH:
                piece = self._piece(text, begin, border[0])
                if (joint := _joint(whole, piece, begin + _REACH // 2)) is not None:
                    return joint[0], (piece[0][joint[1] :], piece[1][joint[1] :])
                break
        return cut[1], self._piece(text, cut[0], border[0])

    def _behind(self, text: str, whole: Encoded, border: tuple[int, int]) -> tuple[int, Encoded]:
        """The tokens behind a border that follow something else than those before it, but for those that stay.

        Returns:
            From which token on they stay, and the tokens from the border to it.
        """
        ids, offsets = whole
        for after in range(border[1], len(ids)):
            begin = offsets[after][0]
            if begin >= border[0] and ids[after] in self.special:
                return after, self._piece(text, border[0], begin)
            if begin - border[0] >= _REACH:
                piece = self._piece(text, border[0], begin)
                if (joint := _joint(whole, piece, border[0] + _REACH // 2)) is not None:
                    return joint[0], (piece[0][: joint[1]], piece[1][: joint[1]])
                break
        return len(ids), self._piece(text, border[0], len(text))

    def continued(self, asked: list[int], prompt: str, completion: str) -> Encoded:
        """Ids of prompt and completion that begin with those of the prompt."""
        text = prompt + completion
        ids, offsets = self.begun(text)
        reach = len(ids) > len(asked) and offsets[len(asked)][0] < len(prompt)
        if not asked or (ids[: len(asked)] == asked and not reach):
            return ids, offsets
        self.cuts += 1
        start = self._ends_at(asked, prompt)
        ids, offsets = self._piece(text, start, len(text))
        return asked + ids, [(0, start)] * len(asked) + offsets

    def ends_in(self, ids: Sequence[int], end: int) -> bool:
        """Whether a text ends in this token, but for white space after it."""
        last = [*ids[-_END_AMONG:]]
        if end not in last:
            return False
        after = last[len(last) - last[::-1].index(end) :]
        return not self._tokenizer.decode(after).strip()

    def without_last_special(self, text: str) -> int | None:
        """Characters of a text before the white space or special token that it ends in; None: it ends in neither."""
        found = self._last_special.search(text)
        return None if found is None else found.start()

    @cached_property
    def _last_special(self) -> re.Pattern[str]:
        words = sorted(self._tokenizer.added_tokens_encoder, key=len, reverse=True)
        return re.compile(rf"(?:{'|'.join(map(re.escape, words)) or '(?!)'})\s*\Z|\s+\Z")

    def _ends_at(self, asked: list[int], prompt: str) -> int:
        """Characters of a prompt that its tokens stand for: the last ones may be left to the answer."""
        ids, offsets = self.begun(prompt)
        if ids == asked:
            return len(prompt)
        ids, offsets = self.begun(prompt + "a")
        return offsets[len(asked) - 1][1] if ids[: len(asked)] == asked else len(prompt)

    def _piece(self, text: str, start: int, stop: int) -> Encoded:
        """Ids of a part of a text, tokenized as what follows something; a token that is special needs none."""
        if start == 0:
            return self.of(text[:stop])
        for anchor in _ANCHORS:
            ids, offsets = self.of(anchor + text[start:stop])
            first = sum(end <= len(anchor) for _, end in offsets)
            if first == len(ids) or offsets[first][0] >= len(anchor):
                shift = start - len(anchor)
                return ids[first:], [(begin + shift, end + shift) for begin, end in offsets[first:]]
        raise InputError(
            "the tokenizer has no tokens that end where the prompt does: "
            f"{text[max(start - 20, 0) : start]!r} and then {text[start : start + 20]!r}; give "
            "chat_template: a file whose prompt ends otherwise"
        )

    def _encoded(self, text: str, **how: Any) -> Encoded:
        check_whole_characters(text, "the text")
        encoded = self._tokenizer(text, return_offsets_mapping=True, verbose=False, **how)
        return encoded["input_ids"], encoded["offset_mapping"]


def _joint(whole: Encoded, piece: Encoded, place: int) -> tuple[int, int] | None:
    """From which token on the two are the same, at a character or soon behind it; None: they are not the same there."""
    one = bisect_left(whole[1], place, key=_begin)
    other = bisect_left(piece[1], place, key=_begin)
    alike = min(_ALIKE, len(whole[0]) - one, len(piece[0]) - other)
    same = alike > 0 and all(whole[part][one : one + alike] == piece[part][other : other + alike] for part in (0, 1))
    return (one, other) if same else None


def _begin(offset: tuple[int, int]) -> int:
    return offset[0]


def _end(offset: tuple[int, int]) -> int:
    return offset[1]
