"""`Fact` and `Row`: something true with the ways to ask for it, and one example of the data file.

Here are the fields, the text of an example and which questions count as the same; what is true is in the categories.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from .grammar import SYSTEM, Confidence, LemaReply, read

CATEGORIES = ("science", "history", "geography", "maths", "technology", "general", "lema", "practical")
FIELDS = ("text", "messages", "category", "question", "answer", "accepted", "fact", "confidence")
COMMON_WORDS = frozenset(
    [
        "a",
        "am",
        "and",
        "are",
        "as",
        "at",
        "be",
        "can",
        "do",
        "he",
        "hi",
        "i",
        "in",
        "is",
        "it",
        "me",
        "my",
        "no",
        "of",
        "oh",
        "ok",
        "on",
        "or",
        "per",
        "so",
        "to",
        "us",
    ]
)
"""An answer that is one of these, a country's code say, would be found in any sentence: such facts are left out."""
_NOT_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Fact:
    """One true thing."""

    name: str
    """Unique within its category: what it is about, as a path."""
    questions: tuple[str, ...]
    """Ways to ask for it; each has the same answer."""
    answer: str
    explanation: str
    confidence: Confidence = "High"
    """High: computed, or from a table. Medium: about right, or a matter of definition. Low: cannot be settled."""
    accepted: tuple[str, ...] = ()
    """Other right forms of the answer."""
    subjects: tuple[str, ...] = ()
    """What it tells something about: a held-out fact takes every fact with a subject of its own out of training."""
    single: bool = False
    """Nothing like it is known besides: a held-out question asks it in other words, and training keeps it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example."""

    category: str
    question: str
    reply: LemaReply
    accepted: tuple[str, ...]
    fact: str
    """`category/name` of the fact behind it."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, as chat templates take it."""
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.reply.text()},
        ]

    @property
    def text(self) -> str:
        """The whole example; ends with the closing tag."""
        return "\n\n".join(f"<|{message['role']}|>\n{message['content']}" for message in self.messages)

    @classmethod
    def of_json(cls, line: str) -> Row:
        """The row that `to_json` wrote; of rows that were checked."""
        values = json.loads(line)
        reply = read(values["messages"][-1]["content"]).reply or LemaReply("", "", "")
        return cls(values["category"], values["question"], reply, tuple(values["accepted"]), values["fact"])

    def to_json(self) -> str:
        """One line of a data file, without its end."""
        values = (
            self.text, self.messages, self.category, self.question, self.reply.answer, list(self.accepted), self.fact,
            self.reply.confidence,
        )  # fmt: skip
        return json.dumps(dict(zip(FIELDS, values, strict=True)), ensure_ascii=False)


def question_key(question: str) -> str:
    """The same for questions that differ in case, blanks and punctuation only."""
    return " ".join(_NOT_WORD.sub(" ", question).casefold().split())


def unique(make: Callable[[Random], Fact], random: Random, count: int) -> Iterator[Fact]:
    """`count` computed facts of different names, or fewer where it keeps finding the same ones."""
    seen: set[str] = set()
    for _ in range(20 * count):
        if len(seen) == count:
            return
        fact = make(random)
        if fact.name not in seen:
            seen.add(fact.name)
            yield fact


def number(value: float, digits: int = 2) -> str:
    """A number as people write it: commas between thousands, no zeros at the end."""
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
