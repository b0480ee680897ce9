"""Maths: arithmetic, number theory and, from beside it, geometry; computed from numbers of the random stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random

from ..rows import Fact, number, unique
from ..unsettled import unsettled
from . import geometry

_ROMAN = ((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"),
          (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))  # fmt: skip


def facts(random: Random) -> Iterator[Fact]:
    """All facts of maths."""
    for make, count in _MAKERS:
        yield from unique(make, random, count)
    yield from geometry.facts(random)
    yield from _unsettled()


def _fact(
    name: str, questions: tuple[str, ...], value: int | str, explanation: str, accepted: tuple[str, ...] = ()
) -> Fact:
    text = f"{value:,}" if isinstance(value, int) else value
    return Fact(name, questions, text, explanation, accepted=accepted)


def _add(random: Random) -> Fact:
    a, b = random.randint(11, 999), random.randint(11, 999)
    return _fact(
        f"add/{a}/{b}", (f"What is {a} plus {b}?", f"What is the sum of {a} and {b}?", f"Add {a} and {b}."),
        a + b, f"{a} + {b} = {a + b:,}, and {a + b} is {'even' if (a + b) % 2 == 0 else 'odd'}.",
    )  # fmt: skip


def _subtract(random: Random) -> Fact:
    b, difference = random.randint(11, 500), random.randint(11, 499)
    a = b + difference
    return _fact(
        f"subtract/{a}/{b}", (f"What is {a} minus {b}?", f"What is left of {a} when {b} are taken away?"),
        difference, f"{b} + {difference} = {a}.",
    )  # fmt: skip


def _multiply(random: Random) -> Fact:
    a, b = random.randint(3, 25), random.randint(3, 99)
    return _fact(
        f"multiply/{a}/{b}",
        (f"What is {a} times {b}?", f"What is the product of {a} and {b}?", f"Multiply {a} by {b}."),
        a * b, f"{a} groups of {b} make {a * b:,}.",
    )  # fmt: skip


def _divide(random: Random) -> Fact:
    b, quotient = random.randint(3, 25), random.randint(3, 60)
    a = b * quotient
    return _fact(
        f"divide/{a}/{b}", (f"What is {a} divided by {b}?", f"How many times does {b} go into {a}?"),
        quotient, f"{b} times {quotient} is {a:,}.",
    )  # fmt: skip


def _remainder(random: Random) -> Fact:
    b, quotient = random.randint(3, 25), random.randint(3, 40)
    rest = random.randint(0, b - 1)
    a = b * quotient + rest
    return _fact(
        f"remainder/{a}/{b}",
        (f"What is the remainder when {a} is divided by {b}?", f"What is {a} modulo {b}?"),
        rest, f"{b} times {quotient} is {b * quotient:,}, and {rest} more make {a:,}.",
    )  # fmt: skip


def _square(random: Random) -> Fact:
    a = random.randint(3, 99)
    return _fact(
        f"square/{a}", (f"What is {a} squared?", f"What is the square of {a}?"), a * a, f"{a} times {a} is {a * a:,}."
    )


def _cube(random: Random) -> Fact:
    a = random.randint(2, 30)
    return _fact(
        f"cube/{a}", (f"What is {a} cubed?", f"What is {a} to the power of three?"), a**3,
        f"{a} times {a} is {a * a}, times {a} is {a**3:,}.",
    )  # fmt: skip


def _root(random: Random) -> Fact:
    a = random.randint(3, 60)
    return _fact(
        f"root/{a * a}", (f"What is the square root of {a * a}?", f"Which positive number squared gives {a * a}?"),
        a, f"{a} times {a} is {a * a:,}.",
    )  # fmt: skip


def _rough_root(random: Random) -> Fact:
    a = random.randint(2, 300)
    while math.isqrt(a) ** 2 == a:
        a = random.randint(2, 300)
    text, low = f"{math.sqrt(a):.2f}", math.isqrt(a)
    return Fact(
        f"rough-root/{a}",
        (f"What is the square root of {a}, to two decimals?", f"About how large is the square root of {a}?"),
        f"About {text}", f"It lies between {low} and {low + 1}, and its decimals never end.", "Medium",
        (text, f"{math.sqrt(a):.1f}", f"About {math.sqrt(a):.1f}"),
    )  # fmt: skip


def _percent(random: Random) -> Fact:
    share, whole = random.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 90)), 20 * random.randint(2, 50)
    value = Fraction(share * whole, 100)
    return _fact(
        f"percent/{share}/{whole}", (f"What is {share}% of {whole}?", f"How much is {share} percent of {whole}?"),
        number(float(value)), f"One percent of {whole} is {number(whole / 100)}, and {share} times that is the answer.",
    )  # fmt: skip


def _prime(random: Random) -> Fact:
    a = random.randrange(11, 600, 2)
    divisor = next((d for d in range(2, math.isqrt(a) + 1) if a % d == 0), None)
    return _fact(
        f"prime/{a}", (f"Is {a} a prime number?", f"Is the number {a} prime?"), "No" if divisor else "Yes",
        f"{a} is {divisor} times {a // divisor}." if divisor else f"Only 1 and {a} divide it.",
        (f"{a} is {'not ' if divisor else ''}a prime",),
    )  # fmt: skip


def _next_prime(random: Random) -> Fact:
    a = random.randint(10, 500)
    prime = next(n for n in range(a + 1, 2 * a) if all(n % d for d in range(2, math.isqrt(n) + 1)))
    return _fact(
        f"next-prime/{a}", (f"What is the smallest prime number greater than {a}?",
        f"Which prime comes next after {a}?"),
        prime, f"Only 1 and {prime} divide {prime}.",
    )  # fmt: skip


def _gcd(random: Random) -> Fact:
    shared = random.randint(2, 20)
    a, b = shared * random.randint(2, 15), shared * random.randint(2, 15)
    found = math.gcd(a, b)
    return _fact(
        f"gcd/{a}/{b}",
        (f"What is the greatest common divisor of {a} and {b}?",
         f"Which is the largest number that divides both {a} and {b}?"),
        found, f"{a} is {found} times {a // found}, and {b} is {found} times {b // found}.",
    )  # fmt: skip


def _lcm(random: Random) -> Fact:
    a, b = random.randint(3, 30), random.randint(3, 30)
    found = math.lcm(a, b)
    return _fact(
        f"lcm/{a}/{b}",
        (f"What is the least common multiple of {a} and {b}?",
         f"Which is the smallest number that {a} and {b} both divide?"),
        found, f"It is {a} times {found // a} and {b} times {found // b}.",
    )  # fmt: skip


def _power_of_two(random: Random) -> Fact:
    n = random.randint(3, 20)
    return _fact(
        f"two-to/{n}", (f"What is 2 to the power of {n}?", f"What do you get when you double 1 exactly {n} times?"),
        2**n, f"It is twice {2 ** (n - 1):,}.",
    )  # fmt: skip


def _factorial(random: Random) -> Fact:
    n = random.randint(3, 9)
    return _fact(
        f"factorial/{n}", (f"What is {n} factorial?", f"In how many orders can {n} different books stand?"),
        math.factorial(n), f"It is the product of the whole numbers from 1 to {n}.",
    )  # fmt: skip


def _choose(random: Random) -> Fact:
    n = random.randint(4, 14)
    k = random.randint(2, min(4, n - 2))
    return _fact(
        f"choose/{n}/{k}",
        (f"In how many ways can {k} of {n} people be chosen?",
         f"How many different groups of {k} can be chosen from {n} people?"),
        math.comb(n, k), f"It is the binomial coefficient of {n} over {k}.",
    )  # fmt: skip


def _fractions(random: Random) -> Fact:
    a, b = Fraction(random.randint(1, 7), random.randint(2, 9)), Fraction(random.randint(1, 7), random.randint(2, 9))
    total, about = a + b, "" if (1000 * (a + b)).denominator == 1 else "about "
    return _fact(
        f"fractions/{a}+{b}",
        (f"What is {a} plus {b} as a fraction or whole number?", f"Add the numbers {a} and {b} and simplify."),
        str(total), f"As a decimal it is {about}{number(float(total), 3)}.",
    )  # fmt: skip


def _simplify(random: Random) -> Fact:
    low, k = random.randint(1, 11), random.randint(2, 12)
    high = random.randint(low + 1, 14)
    found = Fraction(low, high)
    return _fact(
        f"simplify/{low * k}/{high * k}",
        (f"Write {low * k}/{high * k} in lowest terms.", f"How can the fraction {low * k}/{high * k} be simplified?"),
        str(found), f"{low * k} and {high * k} can both be divided by {low * k // found.numerator}.",
    )  # fmt: skip


def _equation(random: Random) -> Fact:
    a, x, b = random.randint(2, 15), random.randint(2, 25), random.randint(1, 60)
    return _fact(
        f"equation/{a}/{b}/{a * x + b}",
        (f"Solve for x: {a}x + {b} = {a * x + b}.", f"If {a} times x plus {b} equals {a * x + b}, what is x?"),
        x, f"{a} times {x} is {a * x}, and {b} more make {a * x + b}.", (f"x = {x}",),
    )  # fmt: skip


def _sequence(random: Random) -> Fact:
    start, step = random.randint(1, 40), random.randint(2, 19)
    shown = [start + i * step for i in range(4)]
    return _fact(
        f"sequence/{start}/{step}",
        (f"Which number comes next: {', '.join(map(str, shown))}?",
         f"A sequence adds the same each time: {', '.join(map(str, shown))}. What follows?"),
        start + 4 * step, f"Each number is {step} more than the one before.",
    )  # fmt: skip


def _sum_to(random: Random) -> Fact:
    n = random.randint(5, 120)
    return _fact(
        f"sum-to/{n}",
        (f"What is the sum of the whole numbers from 1 to {n}?",
         f"What do all whole numbers from 1 up to {n} add up to?"),
        n * (n + 1) // 2, f"It is half of {n} times {n + 1}.",
    )  # fmt: skip


def _mean(random: Random) -> Fact:
    values = [random.randint(2, 40) for _ in range(3)]
    values.append(4 * random.randint(10, 30) - sum(values) % 4)
    mean = Fraction(sum(values), 4)
    shown = ", ".join(map(str, values))
    return _fact(
        f"mean/{'-'.join(map(str, values))}", (f"What is the mean of {shown}?",
        f"What is the average of the numbers {shown}?"),
        number(float(mean)), f"Their sum is {sum(values)}, and there are 4 of them.",
    )  # fmt: skip


def _roman(random: Random) -> Fact:
    value, back = random.randint(4, 2100), random.random() < 0.5
    rest, text = value, ""
    for worth, letters in _ROMAN:
        text, rest = text + letters * (rest // worth), rest % worth
    if back:
        return _fact(
            f"roman/{value}", (f"Which number is {text} in Roman numerals?",
            f"What is the Roman numeral {text} as a number?"),
            str(value), f"It is written with {len(text)} letter{'s' if len(text) > 1 else ''}.", (f"{value:,}",),
        )  # fmt: skip
    return _fact(
        f"roman/{value}", (f"How is {value} written in Roman numerals?", f"Write {value} as a Roman numeral."),
        text, f"It takes {len(text)} letter{'s' if len(text) > 1 else ''}.",
    )  # fmt: skip


_MAKERS: tuple[tuple[Callable[[Random], Fact], int], ...] = (
    (_add, 120), (_subtract, 110), (_multiply, 120), (_divide, 100), (_remainder, 80), (_square, 60), (_cube, 25),
    (_root, 40), (_rough_root, 120), (_percent, 80), (_prime, 90), (_next_prime, 60), (_gcd, 70), (_lcm, 70),
    (_power_of_two, 18), (_factorial, 7), (_choose, 25), (_fractions, 60), (_simplify, 60), (_equation, 90),
    (_sequence, 90), (_sum_to, 60), (_mean, 60), (_roman, 100),
)  # fmt: skip


def _unsettled() -> Iterator[Fact]:
    for high in (10, 12, 20, 25, 30, 50, 60, 75, 100, 150, 200, 250, 300, 400, 500, 1000):
        yield unsettled(
            "missing", f"thinking/{high}",
            (f"I am thinking of a number between 1 and {high}. Which one is it?",
             f"Which whole number from 1 to {high} did I just write down?"),
            f"Any of the {high} numbers is possible, each with a chance of 1 in {high} if picked evenly.",
        )  # fmt: skip
        yield unsettled(
            "missing", f"sides/{high}",
            (f"A rectangle has a perimeter of {high} cm. What is its area?",
             f"What is the area of a field whose fence is {high} metres long?"),
            "The perimeter does not settle the area: the shape is missing.",
        )  # fmt: skip
        yield unsettled(
            "missing", f"unknown/{high}",
            (f"If x plus y is {high}, what is x?", f"Two numbers add up to {high}. What is the first of them?"),
            "One equation cannot settle two unknown numbers.",
        )  # fmt: skip
