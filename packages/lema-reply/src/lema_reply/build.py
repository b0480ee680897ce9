"""`build`: facts as the rows of a training file and a held-out file, and both on the disk.

How many rows of what, and which are held out, is decided here; what is true, by the categories.

Layout. A category has about the same number of rows as any other. Of its rows, a fixed share is of questions that
cannot be settled; the rest is spread over its facts, each asked once before any is asked again in other words. Held-out
rows come with the categories in turn, so that the first of them are a fair sample.

Mechanics. Every category draws from a random stream of its own, seeded by a text, so rows depend on the seed and the
data packages' versions alone. Held-out facts are taken out before training rows are made, and with them all facts
about the same subjects, whose answer or explanation would give them away (of which country Lima is the capital); but
for those marked `single`, which stay and are asked in other words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lema.errors import ConfigError, InputError
from lema.storage.atomic import replaced_file

from .categories import FACTS
from .grammar import LemaReply
from .rows import CATEGORIES, Fact, Row, question_key
from .validate import check_files

FEWEST, MOST = 5_000, 10_000
HELD_OUT = 400
_LOW_SHARE = 0.065
_MEDIUM_SHARE = 1 / 6  # at most, while there are other facts: some tables are approximate all over
_OTHER_WORDS = (
    "Please answer: {}", "Quick question: {}", "I would like to know: {}", "Answer briefly: {}", "Tell me: {}",
    "Here is a question: {}",
)  # fmt: skip


@dataclass(frozen=True)
class CategoryCount:
    """What a category came to."""

    category: str
    rows: int
    held_out: int
    facts: int
    """Facts behind the training rows."""
    confidence: dict[str, int]
    """Training rows by confidence."""
    shared_facts: int
    """Held-out rows whose fact training has too, asked in other words."""


@dataclass(frozen=True)
class Built:
    """A data set in memory."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]

    def counts(self) -> list[CategoryCount]:
        """One for each category, in their order."""
        found = []
        for category in CATEGORIES:
            rows = [row for row in self.train if row.category == category]
            held_out = [row for row in self.held_out if row.category == category]
            facts = {row.fact for row in rows}
            found.append(
                CategoryCount(
                    category, len(rows), len(held_out), len(facts), Counter(row.reply.confidence for row in rows),
                    sum(row.fact in facts for row in held_out),
                )
            )  # fmt: skip
        return found


def build(count: int = FEWEST, seed: int = 0, held_out: int = HELD_OUT, any_size: bool = False) -> Built:
    """Make a data set.

    Args:
        count: rows to train on.
        seed: the same one gives the same rows.
        held_out: rows to evaluate on, besides.
        any_size: allow any count that there are questions for.

    Raises:
        ConfigError: the count is out of range, or there are not so many different questions.
    """
    if count < 1 or held_out < 0 or seed < 0:
        raise ConfigError(f"count={count} must be 1 or more, held_out={held_out} and seed={seed} 0 or more")
    if not any_size and not FEWEST <= count <= MOST:
        raise ConfigError(
            f"count={count} is outside {FEWEST:,} to {MOST:,}, the sizes this data set is meant for; "
            "--any-size lifts the limit"
        )
    train: list[Row] = []
    kept: list[Row] = []
    asked: set[str] = set()
    for number, category in enumerate(CATEGORIES):
        random = Random(f"lema-reply/{seed}/{category}")
        facts = _checked(category, FACTS[category](random))
        random.shuffle(facts)
        part = _CategoryRows(category, facts, random, asked)
        kept += part.held_out(_share(held_out, number))
        train += part.training(_share(count, number))
    order = Random(f"lema-reply/{seed}/order")
    order.shuffle(train)
    order.shuffle(kept)
    return Built(tuple(train), tuple(_in_turn(kept)))


def write(built: Built, train: Path, held_out: Path) -> None:
    """Write both files: aside, flushed to the disk, read back and checked, then put in place.

    Raises:
        InputError: what was written is not what was meant, which no fault of the caller explains.
        OSError: the disk refuses.
    """
    for path in (train, held_out):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(held_out, durable=True) as held_out_aside, replaced_file(train, durable=True) as train_aside:
        written = ((train_aside, built.train), (held_out_aside, built.held_out))
        for path, rows in written:
            with path.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(row.to_json() + "\n" for row in rows)
        checked = check_files([path for path, rows in written if rows])
        if checked.faults or checked.rows != len(built.train) + len(built.held_out):
            raise InputError(f"the rows written to {train.parent} read back wrong: {checked.faults[:3]}")


def _in_turn(rows: Sequence[Row]) -> list[Row]:
    """The rows with the categories in turn, so that the first of them are a fair sample."""
    nth: Counter[str] = Counter()
    turns = []
    for row in rows:
        turns.append(nth[row.category])
        nth[row.category] += 1
    return [row for _, row in sorted(zip(turns, rows), key=lambda pair: pair[0])]


def _share(total: int, number: int) -> int:
    """Rows of a category: even shares, what is left over goes to the first ones."""
    return total // len(CATEGORIES) + (number < total % len(CATEGORIES))


def _checked(category: str, facts: Iterable[Fact]) -> list[Fact]:
    found = list(facts)
    names = Counter(fact.name for fact in found)
    twice = [name for name, times in names.items() if times > 1]
    assert not twice, f"{category}: facts of one name: {twice[:5]}"
    return found


class _CategoryRows:
    """The rows of a category, taken one after the other, no question twice."""

    def __init__(self, category: str, facts: Sequence[Fact], random: Random, asked: set[str]) -> None:
        self._category = category
        self._random = random
        self._asked = asked
        self._kept_back: set[str] = set()
        self._low = [fact for fact in facts if fact.confidence == "Low"]
        self._single = [fact for fact in facts if fact.single]
        self._medium = [fact for fact in facts if fact.confidence == "Medium" and not fact.single]
        self._high = [fact for fact in facts if fact.confidence == "High" and not fact.single]

    def held_out(self, count: int) -> list[Row]:
        """Rows of facts that training will not have, unless they are single; those are at most half."""
        rows = self._take(self._low, round(count * _LOW_SHARE), once=True)
        rows += self._take(self._medium, round(count * _MEDIUM_SHARE), once=True)
        rows += self._take(self._single, (count - len(rows)) // 2, once=True)
        rows += self._take(self._high, count - len(rows), once=True)
        names = {row.fact for row in rows}
        told = {name for facts in (self._medium, self._high) for fact in facts if self._fact(fact) in names
                for name in fact.subjects}  # fmt: skip
        for facts in (self._low, self._medium, self._high):
            facts[:] = [fact for fact in facts if self._fact(fact) not in names and told.isdisjoint(fact.subjects)]
        self._kept_back = {question_key(row.question) for row in rows}
        return self._enough(rows, count)

    def training(self, count: int) -> list[Row]:
        """Rows of what is left: first all facts in their own words, then, where more are wanted, in others."""
        rows = self._take(self._low, round(count * _LOW_SHARE), reworded=True)
        for facts, most in (
            (self._single, count), (self._medium, round(count * _MEDIUM_SHARE)), (self._high, count), (self._medium,
             count),
        ):  # fmt: skip
            rows += self._take(facts, min(most, count - len(rows)))
        rows += self._take([*self._single, *self._high, *self._medium], count - len(rows), reworded=True)
        return self._enough(rows, count)

    def _take(self, facts: Sequence[Fact], count: int, once: bool = False, reworded: bool = False) -> list[Row]:
        """Rows of the facts in turn, each in the first of its words, then each in the next, until there are enough."""
        if count <= 0:
            return []
        ways = [(fact, self._ways(fact, reworded)) for fact in facts]
        rows: list[Row] = []
        for turn in range(1 if once else max((len(way) for _, way in ways), default=0)):
            for fact, way in ways:
                if len(rows) == count:
                    return rows
                if turn < len(way) and (key := question_key(way[turn])) not in self._asked:
                    self._asked.add(key)
                    reply = LemaReply(fact.answer, fact.explanation, fact.confidence)
                    others = tuple(dict.fromkeys(form for form in fact.accepted if form != fact.answer))
                    rows.append(Row(self._category, way[turn], reply, others, self._fact(fact)))
        return rows

    def _ways(self, fact: Fact, reworded: bool) -> list[str]:
        """Its questions; reworded, these again with something before them, but for those that would give a held-out
        question away."""
        own = list(fact.questions)
        if fact.single:
            own = [question for question in own if question_key(question) not in self._kept_back]
        self._random.shuffle(own)
        others = [words.format(question) for words in _OTHER_WORDS for question in own] if reworded else []
        self._random.shuffle(others)
        return own + others

    def _fact(self, fact: Fact) -> str:
        return f"{self._category}/{fact.name}"

    def _enough(self, rows: list[Row], count: int) -> list[Row]:
        if len(rows) < count:
            raise ConfigError(
                f"{self._category} has {len(rows):,} different questions where {count:,} are asked for: "
                "lower --count or --held-out-count"
            )
        return rows
