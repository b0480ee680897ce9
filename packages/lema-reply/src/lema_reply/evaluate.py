"""`evaluate`: the same held-out questions put to several models, or to one model in several ways.

An arm is whatever answers texts: a model, or a program that looks answers up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lema.data.rows import JsonlRows
from lema.errors import ConfigError, InputError

from .grammar import prompt
from .score import Question, Score, judge, question_of

Answerer = Callable[[Sequence[str]], Sequence[str]]
"""Takes prompts, gives a reply to each."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Somebody who answers, and how he is asked."""

    name: str
    answer: Answerer
    in_format: bool = True
    """Whether it is given the format's whole prompt; else the question alone, to be asked in its own way."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the arms said to the same questions."""

    questions: Sequence[Question]
    scores: Sequence[Score]

    def score(self, name: str) -> Score:
        """The score of the arm of that name."""
        return next(score for score in self.scores if score.name == name)

    def no_lower(self, name: str, than: str) -> dict[str, bool]:
        """By category, whether an arm's share of right answers reaches the 95% interval of another's."""
        other = self.score(than).by_category
        return {key: share.value >= other[key].interval[0] for key, share in self.score(name).by_category.items()}

    def to_json(self) -> dict[str, Any]:
        """All numbers, and every question with every reply and its verdict."""
        rows = []
        for i, question in enumerate(self.questions):
            replies = {score.name: asdict(score.verdicts[i]) for score in self.scores}
            rows.append({**asdict(question), "replies": replies})
        return {
            "questions": len(self.questions),
            "settled": sum(question.settled for question in self.questions),
            "arms": {score.name: score.to_json() for score in self.scores},
            "rows": rows,
        }

    def save(self, path: str | os.PathLike[str], **more: Any) -> None:
        """Write `to_json`, with what else is to be said, as one JSON file."""
        text = json.dumps({**more, **self.to_json()}, indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def evaluate(questions: Sequence[Question], arms: Sequence[Arm]) -> Evaluation:
    """Put the questions to every arm, one arm after the other, and score the replies.

    Raises:
        ConfigError: no questions, or two arms of one name.
        InputError: an arm does not give one reply to each prompt.
    """
    if not questions:
        raise ConfigError("there are no questions to ask")
    if len({arm.name for arm in arms}) != len(arms):
        raise ConfigError(f"two arms have one name: {', '.join(arm.name for arm in arms)}")
    scores = []
    for arm in arms:
        prompts = [prompt(question.question) if arm.in_format else question.question for question in questions]
        replies = arm.answer(prompts)
        if len(replies) != len(prompts):
            raise InputError(f"{arm.name} gave {len(replies)} replies to {len(prompts)} prompts")
        verdicts = [judge(question, reply) for question, reply in zip(questions, replies)]
        scores.append(Score(arm.name, arm.in_format, questions, verdicts))
    return Evaluation(questions, scores)


def read_questions(path: str | os.PathLike[str], limit: int | None = None) -> list[Question]:
    """The questions of a data file in its order; with a limit so many, the categories taken in turn.

    Raises:
        InputError: the file, or a row of it, cannot be used; says which.
        ConfigError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be 1 or more")
    rows = JsonlRows(path)
    questions = []
    for number, row in enumerate(rows):
        try:
            questions.append(question_of(row))
        except ValueError as error:
            raise InputError(
                f"{rows.where(number)}: {error}; `lema data build` writes rows that can be evaluated"
            ) from error
    if limit is None or limit >= len(questions):
        return questions
    by_category: dict[str, list[tuple[int, Question]]] = {}
    for entry in enumerate(questions):
        by_category.setdefault(entry[1].category, []).append(entry)
    in_turn = [entry for turn in zip_longest(*by_category.values()) for entry in turn if entry is not None]
    return [question for _, question in sorted(in_turn[:limit], key=lambda entry: entry[0])]
