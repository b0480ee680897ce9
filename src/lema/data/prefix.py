"""Text as token ids, where only its first ones are wanted: a text far longer than they are is not encoded whole.

It knows a fast tokenizer; it knows nothing of what the text is.

The first characters of a text give its first tokens, but for those near the cut: a tokenizer looks ahead no further
than to the end of a word, and a merge reaches no further than over a few. Those of the last `_MARGIN` characters are
thrown away, and as many more characters are taken until enough tokens are left.
"""

from __future__ import annotations

from typing import Any

_WHOLE = 1 << 16
"""Characters up to which a text is encoded whole, so that its length in tokens is exact."""
_PER_TOKEN = 32
"""Characters taken at first for each token that is wanted: four to eight times what text has."""
_MARGIN = 4096


def encode_text(
    tokenizer: Any, text: str, limit: int | None = None, **options: Any
) -> tuple[list[int], list[tuple[int, int]], int | None]:
    """Token ids, and for each the characters it stands for.

    Args:
        limit: tokens that are wanted; None: all.
        options: of the tokenizer.

    Returns:
        Ids, offsets, and None; or, of a far longer text, at least `limit + 1` of them, and about how many all are.
    """
    length = _MARGIN + (_WHOLE if limit is None else max(_WHOLE, limit * _PER_TOKEN))
    while limit is not None and 2 * length < len(text):
        ids, offsets = _encoded(tokenizer, text[:length], options)
        kept = next((n for n, (_, end) in enumerate(offsets) if end > length - _MARGIN), len(offsets))
        if kept > limit:
            return ids[:kept], offsets[:kept], max(limit + 1, kept * len(text) // offsets[kept - 1][1])
        length *= 2
    ids, offsets = _encoded(tokenizer, text, options)
    return ids, offsets, None


def _encoded(tokenizer: Any, text: str, options: dict[str, Any]) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
    return encoded["input_ids"], encoded["offset_mapping"]
