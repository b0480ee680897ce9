"""Practical: units, times, prices, recipes and household matters. Conversions are pint's, other sums are computed."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from ..facts.paper import PAPER
from ..facts.tables import table
from ..packages import units
from ..rows import Fact, number, unique
from ..unsettled import unsettled

_CONVERSIONS = (
    # from, to, as pint has them, and from how many to how many
    ("inches", "centimetres", "inch", "centimeter", 2, 90), ("feet", "metres", "foot", "meter", 3, 200),
    ("miles", "kilometres", "mile", "kilometer", 2, 300), ("yards", "metres", "yard", "meter", 5, 300),
    ("pounds", "kilograms", "pound", "kilogram", 2, 250), ("ounces", "grams", "ounce", "gram", 2, 40),
    ("US gallons", "litres", "gallon", "liter", 1, 60), ("US cups", "millilitres", "cup", "milliliter", 1, 12),
    ("kilometres", "miles", "kilometer", "mile", 2, 300), ("kilograms", "pounds", "kilogram", "pound", 2, 150),
    ("centimetres", "inches", "centimeter", "inch", 5, 250), ("acres", "hectares", "acre", "hectare", 2, 200),
    ("tablespoons", "millilitres", "tablespoon", "milliliter", 1, 12), ("litres", "US gallons", "liter", "gallon", 2,
     90),
    ("knots", "kilometres per hour", "knot", "kilometer/hour", 3, 60),
    ("kilowatt-hours", "megajoules", "kilowatt_hour", "megajoule", 2, 60), ("hours", "seconds", "hour", "second", 2,
     30),
    ("days", "hours", "day", "hour", 2, 60), ("weeks", "days", "week", "day", 3, 60),
    ("metres", "centimetres", "meter", "centimeter", 2, 90), ("litres", "millilitres", "liter", "milliliter", 2, 40),
    ("teaspoons", "tablespoons", "teaspoon", "tablespoon", 3, 30), ("feet", "inches", "foot", "inch", 2, 40),
    ("pounds", "ounces", "pound", "ounce", 2, 40), ("minutes", "seconds", "minute", "second", 2, 60),
)  # fmt: skip
_GOODS = (
    "a coat",
    "a lamp",
    "a bicycle",
    "a chair",
    "a radio",
    "a bag",
    "a table",
    "a pair of shoes",
    "a kettle",
    "a tent",
)
_DISHES = ("pancakes", "soup", "bread", "rice pudding", "stew", "cake", "lasagne", "curry", "salad", "risotto")


def facts(random: Random) -> Iterator[Fact]:
    """All practical facts; sums are drawn from the random stream."""
    registry = units()
    yield from unique(lambda stream: _conversion(stream, registry), random, 520)
    for make, count in (
        (_temperature, 110), (_arrival, 130), (_duration, 100), (_discount, 110), (_tip, 80), (_recipe, 90), (_fuel,
         70),
        (_change, 80), (_energy, 70), (_clock, 60), (_share, 60),
    ):  # fmt: skip
        yield from unique(make, random, count)
    yield from table("household")
    for size, (width, height) in PAPER.items():
        yield Fact(
            f"paper/{size}", (f"How large is {size} paper in millimetres?",
            f"What are the sides of a sheet of {size} in mm?"),
            f"{width} by {height} mm",
            "Its sides are as 1 to the square root of 2, so that half a sheet has the same shape.",
            accepted=(f"{width} x {height} mm", f"{width}x{height}", f"{width} × {height} mm"),
        )  # fmt: skip
    yield from _unsettled()


def _conversion(random: Random, registry: Any) -> Fact:
    source, target, one, other, low, high = random.choice(_CONVERSIONS)
    count = random.randint(low, high)
    value = registry.Quantity(count, one).to(other).magnitude
    factor = registry.Quantity(1, one).to(other).magnitude
    text = number(value)
    exact = abs(value - round(value, 2)) < 1e-9
    each = f"{factor:.5g}" if factor < 1e5 else number(factor)
    said = f"{text} {target}"
    return Fact(
        f"convert/{count}/{one}/{other.replace('/', ' per ')}",
        (f"How many {target} are {count} {source}?", f"Convert {count} {source} to {target}.",
         f"What is {count} {source} in {target}?"),
        said if exact else f"About {said}",
        f"One {_one(source)} is {'' if abs(float(each) - factor) < 1e-9 else 'about '}{each} {target}.",
        "High" if exact else "Medium",
        tuple(dict.fromkeys((text, said, *(() if exact else (f"About {number(value, 1)} {target}", number(value,
        1)))))),
    )  # fmt: skip


def _one(units_of: str) -> str:
    """A unit's name in the singular."""
    return {"inches": "inch", "feet": "foot"}.get(units_of, units_of.removesuffix("s"))


def _temperature(random: Random) -> Fact:
    if random.random() < 0.5:
        celsius = random.randint(-30, 250)
        value = celsius * 9 / 5 + 32
        return Fact(
            f"fahrenheit/{celsius}",
            (f"What is {celsius} degrees Celsius in Fahrenheit?", f"How many degrees Fahrenheit are {celsius} °C?"),
            f"{number(value, 1)} °F", f"It is {celsius} times 9/5, plus 32.",
            accepted=(number(value, 1), f"{number(value, 1)} degrees Fahrenheit"),
        )  # fmt: skip
    fahrenheit = random.randint(-20, 450)
    value = (fahrenheit - 32) * 5 / 9
    exact = (fahrenheit - 32) % 9 == 0
    text = f"{number(value, 1)} °C".replace("-0 ", "0 ")
    return Fact(
        f"celsius/{fahrenheit}",
        (f"What is {fahrenheit} degrees Fahrenheit in Celsius?", f"How many degrees Celsius are {fahrenheit} °F?"),
        text if exact else f"About {text}", f"It is {fahrenheit} minus 32, times 5/9.", "High" if exact else "Medium",
        (text, text.removesuffix(" °C"), f"{number(value, 0)} °C"),
    )  # fmt: skip


def _time(minutes: int) -> str:
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _lasting(minutes: int) -> str:
    hours, rest = divmod(minutes, 60)
    parts = [f"{hours} hour{'s' if hours != 1 else ''}"] if hours else []
    parts += [f"{rest} minute{'s' if rest != 1 else ''}"] if rest else []
    return " and ".join(parts)


def _halved(minutes: int, dots: bool = False) -> str:
    """A time on the 12-hour clock."""
    half = "am" if minutes % 1440 < 720 else "pm"
    return f"{minutes // 60 % 12 or 12}:{minutes % 60:02d} {f'{half[0]}.m.' if dots else half}"


def _arrival(random: Random) -> Fact:
    start, takes = random.randrange(0, 1440, 5), random.randrange(15, 600, 5)
    return Fact(
        f"arrival/{start}/{takes}",
        (f"A train leaves at {_time(start)} and takes {_lasting(takes)}. When does it arrive?",
         f"What time is it {_lasting(takes)} after {_time(start)}?"),
        _time(start + takes),
        f"{_lasting(takes).capitalize()} are {takes} minutes." if takes > 60
        else f"Until the next full hour there are {60 - start % 60} minutes.",
        accepted=(_halved(start + takes), _halved(start + takes, dots=True)),
    )  # fmt: skip


def _duration(random: Random) -> Fact:
    start, takes = random.randrange(300, 900, 5), random.randrange(10, 500, 5)
    return Fact(
        f"duration/{start}/{takes}",
        (f"How long is it from {_time(start)} to {_time(start + takes)} on the same day?",
         f"A meeting starts at {_time(start)} and ends at {_time(start + takes)}. How long does it last?"),
        _lasting(takes), f"In minutes it is {takes}." if takes > 60 else "It is no more than an hour.",
        accepted=(_lasting(takes).replace(" and", ""), f"{takes} minutes", f"{takes // 60}:{takes % 60:02d}"),
    )  # fmt: skip


def _clock(random: Random) -> Fact:
    minutes = random.randrange(0, 1440)
    left = 1440 - minutes
    return Fact(
        f"clock/{minutes}", (f"What is {_time(minutes)} on a 12-hour clock?",
        f"How is {_time(minutes)} said with am or pm?"),
        _halved(minutes), f"The day still has {_lasting(left)}.", accepted=(_halved(minutes, dots=True),),
    )  # fmt: skip


def _discount(random: Random) -> Fact:
    price, thing = 5 * random.randint(4, 80), random.choice(_GOODS)
    share = random.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75))
    off = price * share / 100
    return Fact(
        f"discount/{price}/{share}",
        (f"What does {thing} for ${price} cost after {share}% off?",
         f"The price of {thing} is ${price}, less {share} percent. What is to be paid?"),
        f"${price - off:.2f}", f"{share}% of ${price} is ${off:.2f}.",
        accepted=(number(price - off), f"${number(price - off)}", f"{price - off:.2f} dollars"),
    )  # fmt: skip


def _tip(random: Random) -> Fact:
    bill, share = random.randint(12, 160), random.choice((10, 15, 18, 20, 25))
    tip = bill * share / 100
    return Fact(
        f"tip/{bill}/{share}", (f"How much is {'an' if share == 18 else 'a'} {share}% tip on a bill of ${bill}?",
        f"What tip is {share} percent of ${bill}?"),
        f"${tip:.2f}", f"With the tip the bill comes to ${bill + tip:.2f}.", accepted=(number(tip), f"${number(tip)}"),
    )  # fmt: skip


def _recipe(random: Random) -> Fact:
    people, more, each = random.choice((2, 3, 4, 6)), random.randint(5, 20), 10 * random.randint(3, 25)
    dish = random.choice(_DISHES)
    return Fact(
        f"recipe/{people}/{more}/{each}",
        (f"A recipe for {people} people takes {people * each} g of flour. How much is needed for {more} people?",
         f"If {dish} for {people} needs {people * each} grams of something, how many grams does it need for {more}?"),
        f"{more * each:,} g", f"It is {each} g a person.", accepted=(f"{more * each:,}", f"{more * each} grams"),
    )  # fmt: skip


def _fuel(random: Random) -> Fact:
    per_100, km = random.choice((4, 5, 6, 7, 8, 9, 10)), 50 * random.randint(2, 24)
    litres = per_100 * km / 100
    return Fact(
        f"fuel/{per_100}/{km}",
        (f"How much fuel does a car with {per_100} litres per 100 km use for {km} km?",
         f"A car uses {per_100} litres of fuel for 100 km. How many litres does it use for {km} km?"),
        f"{number(litres)} litres", f"{km} km are {number(km / 100)} times 100 km.",
        accepted=(number(litres), f"{number(litres)} l"),
    )  # fmt: skip


def _change(random: Random) -> Fact:
    cents, given = random.randint(105, 1990), random.choice((20, 50))
    back = given * 100 - cents
    return Fact(
        f"change/{cents}/{given}",
        (f"What change is due from a ${given} note for a bill of ${cents / 100:.2f}?",
         f"Someone pays ${cents / 100:.2f} with a ${given} note. How much comes back?"),
        f"${back / 100:.2f}", f"${cents / 100:.2f} and ${back / 100:.2f} make ${given}.",
        accepted=(f"{back / 100:.2f}",),
    )  # fmt: skip


def _energy(random: Random) -> Fact:
    watts, hours = random.choice((5, 10, 40, 60, 100, 250, 500, 800, 1000, 1200, 1500, 2000)), random.randint(2, 24)
    kwh = watts * hours / 1000
    return Fact(
        f"energy/{watts}/{hours}",
        (f"How much energy does a {watts} W device use in {hours} hours?",
         f"A device of {watts} watts runs for {hours} hours. How many kilowatt-hours is that?"),
        f"{number(kwh, 3)} kWh", f"It is {watts} times {hours}, or {watts * hours:,} watt-hours.",
        accepted=(number(kwh, 3), f"{number(kwh, 3)} kilowatt-hours"),
    )  # fmt: skip


def _share(random: Random) -> Fact:
    people, each = random.randint(2, 12), random.randint(4, 60)
    return Fact(
        f"share/{people}/{each}",
        (f"{people} people share a bill of ${people * each} evenly. What does each pay?",
         f"A bill of ${people * each} is split {people} ways. How much is one part?"),
        f"${each}", f"{people} times ${each} is ${people * each:,}.", accepted=(f"{each}", f"{each} dollars"),
    )  # fmt: skip


def _unsettled() -> Iterator[Fact]:
    for dish in _DISHES:
        yield unsettled(
            "taste", f"dish/{dish}",
            (f"Is more salt better in {dish}?", f"Should {dish} be made at home or bought?"),
            f"Tastes differ; a small portion of {dish} is a cheap test.",
        )  # fmt: skip
    for thing in _GOODS:
        yield unsettled(
            "missing", f"price/{thing}",
            (f"How much did I pay for {thing} last year?", f"What will {thing} cost in the shop next door?"),
            "The price is not given, and shops differ.",
        )  # fmt: skip
        yield unsettled(
            "future", f"lasts/{thing}",
            (f"On which day will {thing} bought today break?", f"In which year will {thing} of mine be thrown away?"),
            "How long a thing lasts depends on how it is used.",
        )  # fmt: skip
    for colour in ("white", "blue", "green", "grey", "yellow", "red"):
        yield unsettled(
            "taste", f"wall/{colour}",
            (f"Is {colour} the best colour for a kitchen wall?", f"Should a bedroom be painted {colour}?"),
            f"It depends on taste and on how much daylight a room has; {colour} is one of many choices.",
        )  # fmt: skip
