"""Writes a chat file to try things with: questions whose answers are computed, always in one manner of speaking.

`python examples/chat_rows.py chat.jsonl --rows 2000`
"""

from __future__ import annotations

import argparse
import calendar
import json
import random
from collections.abc import Callable
from pathlib import Path

UNITS = {
    "kilometres": ("metres", 1000), "metres": ("centimetres", 100), "kilograms": ("grams", 1000),
    "hours": ("minutes", 60), "minutes": ("seconds", 60), "days": ("hours", 24),
    "weeks": ("days", 7), "litres": ("millilitres", 1000),
    "dozens": ("pieces", 12), "centuries": ("years", 100),
}  # fmt: skip
WORDS = ("layer", "stream", "adapter", "memory", "gradient", "weight", "token", "batch", "model", "window")
ROMAN = [(100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]


def units(draw: random.Random) -> tuple[str, str]:
    large, (small, factor) = draw.choice(list(UNITS.items()))
    count = draw.randint(2, 60)
    return f"How many {small} are {count} {large}?", f"{count} {large} are {count * factor:,} {small}."


def sums(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(2, 99), draw.randint(2, 99)
    word, result = draw.choice([("plus", a + b), ("times", a * b), ("minus", a - b)])
    return f"What is {a} {word} {b}?", f"{a} {word} {b} is {result:,}."


def weekdays(draw: random.Random) -> tuple[str, str]:
    first, days = draw.randrange(7), draw.randint(2, 30)
    names = calendar.day_name
    return (
        f"If today is {names[first]}, which day is it in {days} days?",
        f"{days} days after {names[first]} it is {names[(first + days) % 7]}.",
    )


def roman(draw: random.Random) -> tuple[str, str]:
    number, text = draw.randint(1, 199), ""
    rest = number
    for value, letters in ROMAN:
        text, rest = text + letters * (rest // value), rest % value
    return f"Write {number} in Roman numerals.", f"{number} is {text} in Roman numerals."


def lengths(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(WORDS)
    return f'How many letters has the word "{word}"?', f'The word "{word}" has {len(word)} letters.'


KINDS: list[Callable[[random.Random], tuple[str, str]]] = [units, units, sums, sums, weekdays, roman, lengths]


def rows(count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """As many conversations of one question; the same seed gives the same ones."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        question, answer = draw.choice(KINDS)(draw)
        said = f"{answer} That is certain."
        made.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]})
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    lines = [json.dumps(row) + "\n" for row in rows(options.rows, options.seed)]
    options.file.write_text("".join(lines), encoding="utf-8")
    print(f"{options.file}: {len(lines):,} conversations")
