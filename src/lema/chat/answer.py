"""`Reply`: one answer, cut where it ended.

Made of token ids, end tokens and stop texts alone: no model is needed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.generation import streamers

from .sampling import Sampling


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer."""

    text: str
    """Without special tokens; up to the stop text that ended it, which is kept if the sampling says so."""
    num_tokens: int
    """Of the answer, its end token included."""
    seconds: float
    """From prompt to end; of answers made together, of all of them."""
    ended_by: str
    """'end' (the model's own end token), 'stop' (a stop text) or 'length'."""
    raw: str = ""
    """As the model wrote it, special tokens and stop text included."""


def reply_of(new: Sequence[int], tokenizer: Any, ends: Collection[int], sampling: Sampling, seconds: float) -> Reply:
    """The answer in the tokens `[new]` that followed a prompt, padding after its end included or not."""
    new = list(new)
    at = next((i for i, token in enumerate(new) if token in ends), None)
    if at is not None:
        new = new[: at + 1]
    text = tokenizer.decode(new, skip_special_tokens=True)
    stop = first_stop(text, sampling.stop)
    if stop is None:
        ended_by = "length" if at is None else "end"
        return Reply(text, len(new), seconds, ended_by, tokenizer.decode(new))

    def stopped(count: int) -> bool:
        return first_stop(tokenizer.decode(new[:count], skip_special_tokens=True), sampling.stop) is not None

    new = new[: bisect_left(range(len(new)), True, key=stopped)]
    text = text[: stop[1] if sampling.keep_stop else stop[0]]
    return Reply(text, len(new), seconds, "stop", tokenizer.decode(new))


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Where the first of the stop texts in a text begins and ends."""
    found = [(text.index(stop), text.index(stop) + len(stop)) for stop in stops if stop in text]
    return min(found, default=None)


class TextStreamer(streamers.TextStreamer):
    """Passes text on as it becomes certain, but for what may yet turn out to be the start of a stop text."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None], sampling: Sampling) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell
        self._sampling = sampling
        self._held = ""
        self._stopped = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of text."""
        if self._stopped:
            return
        self._held += text
        stop = first_stop(self._held, self._sampling.stop)
        if stop is not None:
            self._stopped = True
            certain = stop[1] if self._sampling.keep_stop else stop[0]
        else:
            certain = len(self._held) if stream_end else len(self._held) - self._may_begin_a_stop()
        if certain:
            self._tell(self._held[:certain])
        self._held = self._held[certain:]

    def _may_begin_a_stop(self) -> int:
        """Characters at the end that are the beginning of a stop text."""
        longest = 0
        for stop in self._sampling.stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
