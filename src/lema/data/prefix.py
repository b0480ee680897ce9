"""Text as token ids, where only its first ones are wanted: a text far longer than they are is not encoded whole.

It knows nothing of what encodes a text, or what it is.

The first characters of a text give its first tokens, but for those near the cut: a tokenizer looks ahead no further
than to the end of a word, and a merge reaches no further than over a few. Those of the last `_MARGIN` characters are
thrown away, and as many more characters are taken until enough tokens are left.
"""

from __future__ import annotations

from collections.abc import Callable

Encoded = tuple[list[int], list[tuple[int, int]]]
"""Ids, and for each the characters it stands for."""
_WHOLE = 1 << 16
"""Characters up to which a text is encoded whole, so that its length in tokens is exact."""
_PER_TOKEN = 32
"""Characters taken at first for each token that is wanted: four to eight times what text has."""
_MARGIN = 4096


def first_tokens(encode: Callable[[str], Encoded], text: str, limit: int | None = None) -> tuple[Encoded, int | None]:
    """Token ids of a text, and for each the characters it stands for.

    Args:
        encode: ids and offsets of a text, or of its beginning.
        limit: tokens that are wanted; None: all.

    Returns:
        Ids and offsets, and None; or, of a far longer text, at least `limit + 1` of them, and about how many all are.
    """
    length = _MARGIN + (_WHOLE if limit is None else max(_WHOLE, limit * _PER_TOKEN))
    while limit is not None and 2 * length < len(text):
        ids, offsets = encode(text[:length])
        kept = next((n for n, (_, end) in enumerate(offsets) if end > length - _MARGIN), len(offsets))
        if kept > limit:
            return (ids[:kept], offsets[:kept]), max(limit + 1, kept * len(text) // offsets[kept - 1][1])
        length *= 2
    return encode(text), None
