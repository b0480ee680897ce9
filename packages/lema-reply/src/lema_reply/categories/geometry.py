"""Geometry for the maths category: computed from lengths drawn from the random stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from ..rows import Fact, number, unique

_SHAPES = {3: "triangle", 5: "pentagon", 6: "hexagon", 7: "heptagon", 8: "octagon", 9: "nonagon", 10: "decagon"}


def facts(random: Random) -> Iterator[Fact]:
    """All facts of geometry."""
    for make, count in (
        (_rectangle, 90), (_triangle, 60), (_circle, 100), (_box, 60), (_pythagoras, 40), (_angles, 7), (_sides, 7),
    ):  # fmt: skip
        yield from unique(make, random, count)


def _fact(name: str, questions: tuple[str, ...], value: str, explanation: str, accepted: tuple[str, ...]) -> Fact:
    return Fact(name, questions, value, explanation, accepted=accepted)


def _rectangle(random: Random) -> Fact:
    a, b, around = random.randint(3, 60), random.randint(3, 60), random.random() < 0.5
    what = "perimeter" if around else "area"
    value = 2 * (a + b) if around else a * b
    unit = "cm" if around else "square cm"
    return _fact(
        f"rectangle/{what}/{a}/{b}",
        (f"What is the {what} of a rectangle of {a} cm by {b} cm?",
         f"A rectangle has sides of {a} cm and {b} cm. What is its {what}?"),
        f"{value:,} {unit}",
        f"It is twice the sum of {a} and {b}." if around else f"It is {a} times {b}.",
        (f"{value:,}", f"{value} {unit.replace('square cm', 'cm²')}"),
    )  # fmt: skip


def _triangle(random: Random) -> Fact:
    a, b = 2 * random.randint(2, 30), random.randint(3, 40)
    return _fact(
        f"triangle/{a}/{b}",
        (f"What is the area of a triangle with base {a} cm and height {b} cm?",
         f"A triangle is {b} cm high on a base of {a} cm. What is its area?"),
        f"{a * b // 2:,} square cm", f"It is half of {a} times {b}.", (f"{a * b // 2:,}", f"{a * b // 2} cm²"),
    )  # fmt: skip


def _circle(random: Random) -> Fact:
    r, around = random.randint(2, 60), random.random() < 0.5
    value = 2 * math.pi * r if around else math.pi * r * r
    what, unit = ("circumference", "cm") if around else ("area", "square cm")
    text = number(value, 1)
    return Fact(
        f"circle/{what}/{r}",
        (f"About what is the {what} of a circle with radius {r} cm?",
         f"A circle has a radius of {r} cm. What is its {what}, to one decimal?"),
        f"About {text} {unit}",
        f"It is two pi times {r}." if around else f"It is pi times {r} squared, and {r} squared is {r * r:,}.",
        "Medium", (text, f"{text} {unit}", f"{text} {unit.replace('square cm', 'cm²')}"),
    )  # fmt: skip


def _box(random: Random) -> Fact:
    a, b, c = (random.randint(2, 15) for _ in range(3))
    return _fact(
        f"box/{a}/{b}/{c}",
        (f"What is the volume of a box of {a} cm by {b} cm by {c} cm?",
         f"A box is {a} cm long, {b} cm wide and {c} cm high. What is its volume?"),
        f"{a * b * c:,} cubic cm", f"It is {a} times {b} times {c}.", (f"{a * b * c:,}", f"{a * b * c} cm³"),
    )  # fmt: skip


def _pythagoras(random: Random) -> Fact:
    a, b, c = random.choice(((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29), (9, 40, 41)))
    k = random.randint(1, 12)
    a, b, c = a * k, b * k, c * k
    return _fact(
        f"pythagoras/{a}/{b}",
        (f"How long is the hypotenuse of a right triangle with legs of {a} cm and {b} cm?",
         f"A right triangle has legs of {a} cm and {b} cm. How long is its longest side?"),
        f"{c} cm", f"{a} squared plus {b} squared is {c} squared.", (str(c),),
    )  # fmt: skip


def _angles(random: Random) -> Fact:
    sides = random.choice(sorted(_SHAPES))
    return _fact(
        f"angles/{sides}",
        (f"What is the sum of the interior angles of a {_SHAPES[sides]}?",
         f"How many degrees do the inner angles of a {_SHAPES[sides]} add up to?"),
        f"{(sides - 2) * 180:,} degrees", f"A polygon with {sides} sides can be cut into {sides - 2} triangles.",
        (f"{(sides - 2) * 180}", f"{(sides - 2) * 180}°"),
    )  # fmt: skip


def _sides(random: Random) -> Fact:
    sides = random.choice(sorted(_SHAPES))
    return _fact(
        f"sides/{sides}", (f"How many sides does a {_SHAPES[sides]} have?",
        f"What is the number of sides of a {_SHAPES[sides]}?"),
        str(sides), f"Its inner angles add up to {(sides - 2) * 180:,} degrees.", (f"{sides} sides",),
    )  # fmt: skip
