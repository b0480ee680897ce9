"""How good replies are: form and content judged one by one, and counted.

A reply is judged as a text, whoever wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from .grammar import read
from .matching import matches

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what is right."""

    question: str
    answer: str
    accepted: tuple[str, ...]
    """Other right forms of the answer."""
    category: str
    confidence: str = "High"
    """Low: it cannot be settled, so no answer counts as right or wrong."""

    @property
    def settled(self) -> bool:
        """Whether an answer can be right."""
        return self.confidence != "Low"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one reply is worth."""

    text: str
    strict: bool
    """Whether it is exactly in the format."""
    faults: tuple[str, ...]
    answer: str | None
    """The Answer field; None: there is none to be read."""
    confidence: str | None
    right: bool | None
    """Whether the Answer field gives the expected answer, or the whole text where there is no such field; None: the
    question cannot be settled."""
    right_anywhere: bool | None
    """The same for the whole text, whatever fields it has."""


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many."""

    hits: int
    of: int

    @classmethod
    def of_all(cls, outcomes: Iterable[bool]) -> Share:
        """The share of true ones."""
        listed = list(outcomes)
        return cls(sum(listed), len(listed))

    @property
    def value(self) -> float:
        """0 to 1; NaN of none."""
        return self.hits / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% score interval (E. B. Wilson, 1927); 0 to 1 of none."""
        if not self.of:
            return 0.0, 1.0
        n, p = self.of, self.value
        middle = p + _Z * _Z / (2 * n)
        half = _Z * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
        scale = 1 + _Z * _Z / n
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

    def to_json(self) -> dict[str, Any]:
        """Counts, share and interval; None instead of NaN."""
        low, high = self.interval
        return {"hits": self.hits, "of": self.of, "share": self.value if self.of else None, "low": low, "high": high}


@dataclass(frozen=True, slots=True)
class Score:
    """All replies of one arm to the same questions."""

    name: str
    in_format: bool
    """Whether the questions were asked with the format's prompt; asked plainly, no reply can be expected to keep it."""
    questions: Sequence[Question]
    verdicts: Sequence[Verdict]

    @property
    def strict(self) -> Share:
        """Replies exactly in the format, of all."""
        return Share.of_all(verdict.strict for verdict in self.verdicts)

    @property
    def right(self) -> Share:
        """Right answers, of the questions that can be settled."""
        return self._right({question.category for question in self.questions})

    @property
    def right_anywhere(self) -> Share:
        """The same, wherever in the reply the answer stands."""
        return Share.of_all(v.right_anywhere for v in self.verdicts if v.right_anywhere is not None)

    @property
    def by_category(self) -> dict[str, Share]:
        """Right answers of each category that has questions that can be settled."""
        names = dict.fromkeys(question.category for question in self.questions if question.settled)
        return {name: self._right({name}) for name in names}

    @property
    def unsettled_strict(self) -> Share:
        """Replies exactly in the format, of those to questions that cannot be settled."""
        return Share.of_all(v.strict for q, v in zip(self.questions, self.verdicts) if not q.settled)

    @property
    def unsettled_low(self) -> Share:
        """Replies that say Low, of those to questions that cannot be settled."""
        return Share.of_all(v.confidence == "Low" for q, v in zip(self.questions, self.verdicts) if not q.settled)

    def _right(self, categories: set[str]) -> Share:
        pairs = zip(self.questions, self.verdicts)
        return Share.of_all(v.right for q, v in pairs if v.right is not None and q.category in categories)

    def to_json(self) -> dict[str, Any]:
        """All shares of the arm."""
        return {
            "asked": "in the format" if self.in_format else "plainly",
            "strict": self.strict.to_json() if self.in_format else None,
            "right": self.right.to_json(),
            "right_anywhere": self.right_anywhere.to_json(),
            "categories": {name: share.to_json() for name, share in self.by_category.items()},
            "unsettled": {
                "strict": self.unsettled_strict.to_json() if self.in_format else None,
                "says_low": self.unsettled_low.to_json() if self.in_format else None,
            },
        }


def judge(question: Question, text: str) -> Verdict:
    """The verdict on one reply."""
    reading = read(text)
    answer = confidence = None
    if reading.reply is not None:
        answer, confidence = reading.reply.answer or None, reading.reply.confidence or None
    right = anywhere = None
    if question.settled:
        anywhere = gives(question, text)
        right = anywhere if answer is None else gives(question, answer)
    return Verdict(text, reading.strict, reading.faults, answer, confidence, right, anywhere)


def gives(question: Question, text: str) -> bool:
    """Whether the text gives the expected answer in one of its forms."""
    return any(matches(form, text) for form in (question.answer, *question.accepted))


def question_of(row: Mapping[str, Any]) -> Question:
    """The question of a row of the data file.

    Raises:
        ValueError: a field is missing or no text.
    """
    for name in ("question", "answer", "category", "confidence"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"has no text named {name}")
    accepted = row.get("accepted", [])
    if not isinstance(accepted, list) or not all(isinstance(form, str) for form in accepted):
        raise ValueError("accepted is no list of texts")
    return Question(row["question"], row["answer"], tuple(accepted), row["category"], row["confidence"])
