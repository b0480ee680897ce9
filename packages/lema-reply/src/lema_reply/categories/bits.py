"""Bits, bytes and small Python programs for the technology category: computed."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from ..rows import Fact, unique

_WORDS = ("python", "stream", "layer", "tensor", "memory", "matrix", "planet", "garden", "window", "silver", "bridge",
          "forest", "letter", "number", "orange", "rocket")  # fmt: skip


def facts(random: Random) -> Iterator[Fact]:
    """All facts that are computed from numbers and words drawn from the random stream."""
    for make, count in (
        (_binary, 110), (_hexadecimal, 90), (_powers, 20), (_sizes, 60), (_slice, 60), (_floor, 60), (_length, 16),
        (_and_or, 60), (_transfer, 60), (_subnet, 15),
    ):  # fmt: skip
        yield from unique(make, random, count)


def _binary(random: Random) -> Fact:
    value, back = random.randint(5, 255), random.random() < 0.5
    text = f"{value:b}"
    if back:
        return Fact(
            f"binary/{value}", (f"What is binary {text} in decimal?", f"Which decimal number is {text} in base two?"),
            str(value), f"It has {text.count('1')} ones, and the highest stands for {1 << len(text) - 1}.",
        )  # fmt: skip
    return Fact(
        f"binary/{value}", (f"What is {value} in binary?", f"How is {value} written in base two?"),
        text, f"It takes {len(text)} bits.", accepted=(f"0b{text}",),
    )  # fmt: skip


def _hexadecimal(random: Random) -> Fact:
    value, back = random.randint(16, 1023), random.random() < 0.5
    text = f"{value:X}"
    explanation = f"{value} is {' + '.join(f'{int(d, 16)}·{16 ** (len(text) - 1 - i)}' for i, d in enumerate(text))}."
    if back:
        return Fact(
            f"hex/{value}", (f"What is hexadecimal {text} in decimal?", f"Which decimal number is 0x{text}?"),
            str(value), explanation, accepted=(f"{value:,}",),
        )  # fmt: skip
    return Fact(
        f"hex/{value}", (f"What is {value} in hexadecimal?", f"How is {value} written in base sixteen?"),
        text, explanation, accepted=(f"0x{text}",),
    )  # fmt: skip


def _powers(random: Random) -> Fact:
    bits = random.randint(4, 24)
    return Fact(
        f"values/{bits}", (f"How many different values can {bits} bits hold?",
        f"How many numbers can be told apart with {bits} bits?"),
        f"{1 << bits:,}", f"It is 2 to the power of {bits}.", accepted=(f"2^{bits}",),
    )  # fmt: skip


def _sizes(random: Random) -> Fact:
    count = random.choice((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256))
    small, large = random.choice((("bytes", "KiB"), ("KiB", "MiB"), ("MiB", "GiB"), ("GiB", "TiB")))
    return Fact(
        f"size/{count}/{large}", (f"How many {small} are {count} {large}?", f"How much is {count} {large} in {small}?"),
        f"{count * 1024:,} {small}", f"One {large} is 1,024 {small}.", accepted=(f"{count * 1024:,}",),
    )  # fmt: skip


def _slice(random: Random) -> Fact:
    word = random.choice(_WORDS)
    begin = random.randint(0, 3)
    end = random.randint(begin + 1, len(word))
    return Fact(
        f"slice/{word}/{begin}/{end}",
        (f"What does '{word}'[{begin}:{end}] give in Python?",
         f"In Python, what is the slice from {begin} to {end} of the string '{word}'?"),
        f"'{word[begin:end]}'",
        f"A slice has its first index and stops before its last; letters in this one: {end - begin}.",
        accepted=(word[begin:end],),
    )  # fmt: skip


def _floor(random: Random) -> Fact:
    b = random.randint(2, 12)
    a, rest = random.randint(13, 200), random.random() < 0.5
    return Fact(
        f"operator/{'rest' if rest else 'floor'}/{a}/{b}",
        ((f"What does {a} % {b} give in Python?", f"What is the value of the Python expression {a} % {b}?") if rest else
         (f"What does {a} // {b} give in Python?", f"What is the value of the Python expression {a} // {b}?")),
        str(a % b if rest else a // b),
        "The operator % gives the remainder." if rest else "The operator // divides and rounds down.",
    )  # fmt: skip


def _length(random: Random) -> Fact:
    word = random.choice(_WORDS)
    return Fact(
        f"length/{word}", (f"What does len('{word}') give in Python?",
        f"In Python, which number is len of the string '{word}'?"),
        str(len(word)), "len counts the characters of a string.",
    )  # fmt: skip


def _and_or(random: Random) -> Fact:
    a, b = random.randint(1, 31), random.randint(1, 31)
    name, value = random.choice((("AND", a & b), ("OR", a | b), ("XOR", a ^ b)))
    return Fact(
        f"bits/{name}/{a}/{b}",
        (f"What is the bitwise {name} of {a} and {b}?", f"Which number is {a} {name} {b}, bit by bit?"),
        str(value), f"In binary they are {a:05b} and {b:05b}, and the result is {value:05b}.",
    )  # fmt: skip


def _transfer(random: Random) -> Fact:
    rate, seconds = random.choice((10, 20, 25, 40, 50, 80, 100, 125, 200, 250, 400, 500)), random.randint(2, 60)
    return Fact(
        f"transfer/{rate}/{seconds}",
        (f"How long does it take to copy {rate * seconds} MB at {rate} MB/s?",
         f"A disk reads {rate} megabytes a second. How many seconds does a file of {rate * seconds} megabytes take?"),
        f"{seconds} seconds", f"It is {rate * seconds:,} divided by {rate}, if nothing else is slower.",
        accepted=(str(seconds), f"{seconds} s"),
    )  # fmt: skip


def _subnet(random: Random) -> Fact:
    prefix = random.randint(16, 30)
    return Fact(
        f"subnet/{prefix}",
        (f"How many addresses does an IPv4 network with prefix /{prefix} have?",
         f"What is the size of an IPv4 subnet /{prefix} in addresses?"),
        f"{1 << 32 - prefix:,}", f"32 - {prefix} = {32 - prefix} bits are left for hosts; two addresses are reserved.",
    )  # fmt: skip
