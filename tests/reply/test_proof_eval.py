"""Scores: which texts give an answer, intervals by the book, arms side by side, and the files that are written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_helpers import write_jsonl
from lema.cli.app import app
from lema.errors import ConfigError, InputError
from lema_reply.evaluate import Arm, Evaluation, evaluate, read_questions
from lema_reply.grammar import LemaReply, prompt
from lema_reply.matching import matches, plain_form
from lema_reply.plot import plot
from lema_reply.score import Question, Share, judge

QUESTIONS = [
    Question("What is the capital of Norway?", "Oslo", (), "geography"),
    Question("What is the capital of Peru?", "Lima", (), "geography"),
    Question("What is 7 times 8?", "56", ("fifty-six",), "maths"),
    Question("Will it rain in a year?", "Nobody knows", (), "general", "Low"),
]


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("Paris", "The capital of France is PARIS."),
        ("The Pacific Ocean", "It is the  pacific\nocean, of course"),
        ("São Paulo", "Sao Paulo"),
        ("1,000", "about 1000 of them"), ("1000", "1\u202f000"), ("0.5", ".50"), ("-40", "at −40 °C"),
        ("6.022 × 10^23", "6.022 x 10²³ per mole"), ("1.4 billion", "1,400,000,000"), ("8", "There are eight planets."),
        ("5 km", "five kilometers"), ("343 m/s", "343 metres per second"), ("10 m²", "10 square metres"),
        ("100 °C", "100 degrees Celsius"), ("25%", "25 percent"), ("About 100.1 g/mol", "100.1 g/mol"),
        ("20 July 1969", "On July 20th, 1969, they landed."), ("20 July 1969", "the 20th of July 1969"),
        ("C++", "It is written in C++."), ("==", "Use == for it"), ("H2O", "H₂O"), ("A", "Blood type A"),
        ("vitamin C", "Vitamin C is in oranges"), ("1/2", "Half, that is 1/2."), ("O(n log n)", "It takes O(n log n)."),
        ("Newton's second law", "newton’s second law"), (".-", "A is `.-`"),
        ("-.", "-."), ("--", "(--)"), ("(", "an ( opens"),
    ],
)  # fmt: skip
def test_an_answer_is_found_however_it_is_written(expected: str, text: str) -> None:
    assert matches(expected, text), (plain_form(expected), plain_form(text))


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("Oslo", "Oslofjord"), ("12", "12.5"), ("12", "112"), ("5", "-5"), ("1914", "191 4"),
        ("5 km", "5 miles"), ("5 km", "15 km"), ("C++", "C"), ("vitamin A", "vitamin D"), ("New York", "York, New"),
        ("10^3", "103"), ("==", "=== is another"), ("Oslo", ""), ("", "Oslo"), (" ", "Oslo"), ("1/2", "1 or 2"),
        (".-", ".-."), ("-", "-."), ("-.", "-"),
    ],
)  # fmt: skip
def test_what_is_not_the_answer_is_not_found(expected: str, text: str) -> None:
    assert not matches(expected, text), (plain_form(expected), plain_form(text))


@given(st.text(), st.text())
def test_any_texts_can_be_compared(one: str, other: str) -> None:
    matches(one, other)
    if plain_form(one):
        assert matches(one, one)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_numbers_are_compared_by_value(value: Any) -> None:
    assert matches(str(value), f"It is {value:,} or so.")
    assert not matches(str(value), f"It is {value + 1:,} or so.")


def test_huge_powers_take_no_time() -> None:
    assert matches("1e9999", "1 × 10^9999")
    assert len("".join(plain_form("1e9999"))) < 20


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_the_published_ones(hits: int, of: int, low: float, high: float) -> None:
    assert Share(hits, of).interval == pytest.approx((low, high), abs=5e-5)
    assert Share(of - hits, of).interval == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_an_interval_holds_its_share(of: int, part: float) -> None:
    share = Share(round(of * part), of)
    low, high = share.interval
    assert 0 <= low <= share.value + 1e-12 and share.value <= high + 1e-12 <= 1 + 1e-12


def test_the_answer_field_counts_and_without_one_the_text() -> None:
    norway = QUESTIONS[0]
    elsewhere = judge(norway, LemaReply("Bergen", "Oslo is another town.", "High").text())
    assert (elsewhere.strict, elsewhere.right, elsewhere.right_anywhere) == (True, False, True)
    free = judge(norway, "I think it is Oslo.")
    assert (free.strict, free.answer, free.right) == (False, None, True)
    loose = judge(norway, "Answer: Oslo")
    assert (loose.strict, loose.answer, loose.right) == (False, "Oslo", True)
    assert judge(QUESTIONS[2], LemaReply("Fifty-six", "Counted.", "High").text()).right
    open_one = judge(QUESTIONS[3], LemaReply("Nobody knows", "Weather.", "Low").text())
    assert (open_one.strict, open_one.right, open_one.confidence) == (True, None, "Low")


def taught(prompts: Sequence[str]) -> list[str]:
    """Somebody who keeps the format, and knows two of three."""
    answers = {prompt(QUESTIONS[0].question): "Oslo", prompt(QUESTIONS[2].question): "56"}
    return [LemaReply(answers.get(text, "No idea"), "So.", "High").text() for text in prompts]


def plain(questions: Sequence[str]) -> list[str]:
    """Somebody who answers as he likes."""
    return [f"{question} It is Lima." for question in questions]


@pytest.fixture
def evaluation() -> Evaluation:
    return evaluate(QUESTIONS, [Arm("base", plain, in_format=False), Arm("adapter", taught)])


def test_arms_are_asked_in_their_way_and_counted(evaluation: Evaluation) -> None:
    adapter, base = evaluation.score("adapter"), evaluation.score("base")
    assert (adapter.strict, base.strict) == (Share(4, 4), Share(0, 4))
    assert (adapter.right, base.right) == (Share(2, 3), Share(1, 3)), "the unsettled one is left out"
    assert adapter.by_category == {"geography": Share(1, 2), "maths": Share(1, 1)}
    assert (adapter.unsettled_strict, adapter.unsettled_low) == (Share(1, 1), Share(0, 1))
    assert evaluation.no_lower("adapter", than="base") == {"geography": True, "maths": True}
    assert base.verdicts[1].text == "What is the capital of Peru? It is Lima."


def test_the_file_can_be_audited(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.save(tmp_path / "e.json", decoding="greedy")
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert (found["decoding"], found["questions"], found["settled"]) == ("greedy", 4, 3)
    assert found["arms"]["base"]["strict"] is None, "asked plainly, nobody keeps the format"
    assert found["arms"]["adapter"]["strict"]["share"] == 1.0
    for name, arm in found["arms"].items():
        right = [row["replies"][name]["right"] for row in found["rows"]]
        assert arm["right"]["hits"] == sum(value is True for value in right)
        assert arm["right"]["of"] == sum(value is not None for value in right)
    assert found["rows"][2]["accepted"] == ["fifty-six"]
    assert found["rows"][1]["replies"]["adapter"]["answer"] == "No idea"


def test_a_plot_is_drawn(evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot(evaluation, tmp_path / "e.png", "title")
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"cannot be a plot: .*png"):
        plot(evaluation, tmp_path / "e.nothing")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'matplotlib>=3\.8'"):
        plot(evaluation, tmp_path / "f.png")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("--plot", "e.nothing"), "cannot be a plot"),
        (("--plot", "gone/e.png"), "there is no folder gone"),
        (("--json", "gone/e.json"), "there is no folder gone"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_anybody_is_asked(
    files: tuple[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["eval", "nowhere", "--data", "nothing.jsonl", "--format", "lema-reply", *files])
    assert done.exit_code == 1 and said in " ".join(done.output.split()), done.output


def test_questions_come_from_rows_and_a_limit_takes_categories_in_turn(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"{category} {i}?",
            "answer": str(i),
            "category": category,
            "confidence": "High",
            "accepted": ["x"],
        }
        for category in ("maths", "history")
        for i in range(5)
    ]
    path = write_jsonl(tmp_path / "h.jsonl", rows)
    assert len(read_questions(path)) == len(read_questions(path, 99)) == 10
    some = read_questions(path, 3)
    assert [question.question for question in some] == ["maths 0?", "maths 1?", "history 0?"]
    assert some[0] == Question("maths 0?", "0", ("x",), "maths", "High")
    with pytest.raises(ConfigError, match="limit=0"):
        read_questions(path, 0)
    for change, said in (
        ({"answer": " "}, "no text named answer"),
        ({"accepted": "x"}, "accepted is no list of texts"),
    ):
        bad = write_jsonl(tmp_path / "bad.jsonl", [*rows[:2], {**rows[2], **change}])
        with pytest.raises(InputError, match=f"bad.jsonl, line 3: .*{said}.*lema data build"):
            read_questions(bad)


def test_arms_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigError, match="no questions"):
        evaluate([], [Arm("a", taught)])
    with pytest.raises(ConfigError, match="one name: a, a"):
        evaluate(QUESTIONS, [Arm("a", taught), Arm("a", plain)])
    with pytest.raises(InputError, match="a gave 1 replies to 4 prompts"):
        evaluate(QUESTIONS, [Arm("a", lambda prompts: ["x"])])


def test_scoring_needs_no_torch() -> None:
    code = "import sys, lema_reply.evaluate, lema_reply.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
