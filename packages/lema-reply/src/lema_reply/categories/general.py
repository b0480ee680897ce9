"""General: the calendar, words and letters, animals, sports and arts. Dates and letters are computed."""

from __future__ import annotations

import calendar
import datetime
import string
from collections.abc import Iterator
from random import Random

from ..facts.tables import table
from ..facts.words import (
    GROUPS,
    MONTHS,
    MORSE,
    OPPOSITES,
    OTHER_GROUPS,
    OTHER_OPPOSITES,
    SPELLING,
    SPELT,
    SPORTS,
    YOUNG,
)
from ..rows import COMMON_WORDS, Fact, unique
from ..unsettled import unsettled

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_TASTES = {
    "colour": ("blue", "green", "red", "yellow", "purple", "orange"),
    "season": ("spring", "summer", "autumn", "winter"),
    "pet": ("a cat", "a dog", "a rabbit", "a parrot"),
    "drink": ("tea", "coffee", "juice", "water"),
    "music": ("jazz", "opera", "rock", "folk music"),
    "game": ("chess", "go", "poker", "draughts"),
    "hobby": ("gardening", "painting", "cycling", "reading"),
}


def facts(random: Random) -> Iterator[Fact]:
    """All general facts; dates and words are drawn from the random stream."""
    for make, count in (
        (_weekday, 300), (_leap, 90), (_month_days, 60), (_day_of_year, 90), (_days_between, 120), (_letters, 80),
        (_first_word, 80), (_backwards, 50), (_vowels, 60), (_weekday_after, 60),
    ):  # fmt: skip
        yield from unique(make, random, count)
    yield from _codes()
    yield from _pairs()
    yield from table("things")
    yield from _unsettled()


def _date(day: datetime.date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _any_day(random: Random, first: int = 1900, last: int = 2049) -> datetime.date:
    return datetime.date(first, 1, 1) + datetime.timedelta(days=random.randrange(365 * (last - first)))


def _ordinal(count: int) -> str:
    ending = "th" if 10 < count % 100 < 20 else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"


def _weekday(random: Random) -> Fact:
    day = _any_day(random)
    week = day.isocalendar()
    return Fact(
        f"weekday/{day.isoformat()}",
        (f"Which weekday is {_date(day)}?", f"On which day of the week does {_date(day)} fall?",
         f"What day of the week is {day.isoformat()}?"),
        _DAYS[day.weekday()], f"In the Gregorian calendar this day is in ISO week {week[1]} of {week[0]}.",
    )  # fmt: skip


def _weekday_after(random: Random) -> Fact:
    start, days = random.randrange(7), random.randint(5, 120)
    return Fact(
        f"after/{start}/{days}",
        (f"If today is {_DAYS[start]}, which weekday is it in {days} days?",
         f"Which day of the week comes {days} days after a {_DAYS[start]}?"),
        _DAYS[(start + days) % 7], f"Whole weeks do not matter, and {days} is {days % 7} more than a multiple of 7.",
    )  # fmt: skip


def _leap(random: Random) -> Fact:
    year = random.choice((random.randint(1600, 2100), 4 * random.randint(400, 525), 100 * random.randint(16, 24)))
    leap = calendar.isleap(year)
    why = (
        f"{year} can be divided by 400." if year % 400 == 0
        else f"{year} can be divided by 100, but not by 400." if year % 100 == 0
        else f"{year} can{'' if leap else 'not'} be divided by 4."
    )  # fmt: skip
    return Fact(
        f"leap/{year}",
        (f"Is {year} a leap year?", f"Does February have 29 days in {year}?"),
        "Yes" if leap else "No",
        why,
        accepted=(f"{year} is {'' if leap else 'not '}a leap year",),
    )


def _month_days(random: Random) -> Fact:
    year, month = random.randint(1900, 2100), random.randint(1, 12)
    days, leap = calendar.monthrange(year, month)[1], calendar.isleap(year)
    return Fact(
        f"month/{year}/{month}",
        (f"How many days does {MONTHS[month - 1]} {year} have?", f"How long is {MONTHS[month - 1]} {year} in days?"),
        str(days), f"It is month {month} of the year, and {year} is {'a' if leap else 'no'} leap year.",
        accepted=(f"{days} days",),
    )  # fmt: skip


def _day_of_year(random: Random) -> Fact:
    day = _any_day(random, 1950)
    count = day.timetuple().tm_yday
    left = (366 if calendar.isleap(day.year) else 365) - count
    return Fact(
        f"day-of-year/{day.isoformat()}",
        (f"Which day of the year is {_date(day)}, counted from 1 January?",
         f"What number has {_date(day)} among the days of its year?"),
        f"Day {count}", f"After it {left} day{'s are' if left != 1 else ' is'} left of {day.year}.",
        accepted=(str(count), _ordinal(count), f"The {_ordinal(count)}"),
    )  # fmt: skip


def _days_between(random: Random) -> Fact:
    start = _any_day(random, 1950)
    days = random.randint(3, 400)
    end = start + datetime.timedelta(days=days)
    return Fact(
        f"between/{start.isoformat()}/{end.isoformat()}",
        (f"How many days are there from {_date(start)} to {_date(end)}?",
         f"How many days after {_date(start)} is {_date(end)}?"),
        f"{days} days" if days != 1 else "1 day",
        f"The first of the two days is not counted; whole weeks among them: {days // 7}.",
        accepted=(str(days),),
    )  # fmt: skip


def _letters(random: Random) -> Fact:
    word = random.choice(SPELT)
    return Fact(
        f"letters/{word}", (f"How many letters are in the word {word}?", f"How long is the word {word} in letters?"),
        str(len(word)), f"It begins with {word[0]} and ends with {word[-1]}.", accepted=(f"{len(word)} letters",),
    )  # fmt: skip


def _vowels(random: Random) -> Fact:
    word = random.choice(SPELT)
    found = [letter for letter in word if letter in "aeiou"]
    return Fact(
        f"vowels/{word}",
        (f"How many of the letters a, e, i, o, u does the word {word} have?",
         f"Count the letters a, e, i, o and u in {word}."),
        str(len(found)), f"They are, in order: {', '.join(found)}.",
    )  # fmt: skip


def _backwards(random: Random) -> Fact:
    word = random.choice(SPELT)
    return Fact(
        f"backwards/{word}", (f"How is the word {word} spelt backwards?",
        f"Write the word {word} from its last letter to its first."),
        word[::-1], f"The word has {len(word)} letters.",
    )  # fmt: skip


def _first_word(random: Random) -> Fact:
    one, other = random.sample(SPELT, 2)
    low, high = sorted((one, other))
    at = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return Fact(
        f"first-word/{low}/{high}",
        (f"Which word comes first in the alphabet, {one} or {other}?",
         f"Does {one} or {other} come first in a dictionary?"),
        low.capitalize(), f"The words first differ in letter {at + 1}.",
    )  # fmt: skip


def _codes() -> Iterator[Fact]:
    for place, (letter, word) in enumerate(zip(string.ascii_uppercase, SPELLING), 1):
        yield Fact(
            f"spelling/{letter}",
            (f"What is the NATO alphabet word for {letter}?",
             f"Which word stands for the letter {letter} in the ICAO spelling alphabet?"),
            word, f"{letter} is letter number {place} of the alphabet.",
            accepted={"Alfa": ("Alpha",), "Juliett": ("Juliet",), "X-ray": ("Xray",)}.get(word, ()), subjects=(letter,),
        )  # fmt: skip
        if letter.casefold() not in COMMON_WORDS:
            yield Fact(
                f"place/{letter}",
                (f"Which letter is number {place} in the English alphabet?",
                 f"What is the {_ordinal(place)} letter of the English alphabet?"),
                letter, f"Its word in the spelling alphabet is {word}.", subjects=(letter,),
            )  # fmt: skip
        yield Fact(
            f"place-of/{letter}",
            (f"At which place in the English alphabet is the letter {letter}?",
             f"What number is the letter {letter} in the alphabet?"),
            str(place), f"Counted from the end it is number {27 - place}.", accepted=(_ordinal(place),),
            subjects=(letter,),
        )  # fmt: skip
    for sign, code in MORSE.items():
        kind = "letter" if sign.isalpha() else "digit"
        signs = " ".join("dot" if mark == "." else "dash" for mark in code)
        yield Fact(
            f"morse/{sign}",
            (f"How is the {kind} {sign} sent in Morse code?", f"What is the Morse code of the {kind} {sign}?"),
            signs.capitalize(), f"It is written {code}, and a dash is as long as three dots.", accepted=(code,),
        )  # fmt: skip


def _pairs() -> Iterator[Fact]:
    for pair in OPPOSITES.split(","):
        one, other = pair.split()
        for word, opposite in ((one, other), (other, one)):
            if word != "light":  # it has two opposites
                yield Fact(
                    f"opposite/{word}", (f"What is the opposite of {word}?",
                    f"Which word means the opposite of {word}?"),
                    opposite.capitalize(), f"The opposite of {opposite} is {word}.",
                    accepted=OTHER_OPPOSITES.get(word, ()), subjects=(one,),
                )  # fmt: skip
    for animal, young in YOUNG.items():
        same = sorted(other for other, word in YOUNG.items() if word == young and other != animal)
        yield Fact(
            f"young/{animal}", (f"What is the young of {_a(animal)} called?", f"What is a baby {animal} called?"),
            _a(young).capitalize(),
            f"The young of {_a(same[0])} has the same name." if same else f"The word {young} has {len(young)} letters.",
            accepted=(young.capitalize(),),
        )  # fmt: skip
    for animals, group in GROUPS.items():
        yield Fact(
            f"group/{animals}", (f"What is a group of {animals} called?",
            f"Which word is used for a group of {animals}?"),
            group.capitalize(), f"One speaks of {group} of {animals.split(' on ')[0]}.",
            accepted=(group[2:].capitalize(), *OTHER_GROUPS.get(animals, ())),
        )  # fmt: skip
    for sport, (players, remark) in SPORTS.items():
        yield Fact(
            f"players/{sport}",
            (f"How many players of a team are on the field in {sport}?",
             f"What is the number of players a side in {sport}?"),
            str(players), remark, accepted=(f"{players} players",),
        )  # fmt: skip


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _unsettled() -> Iterator[Fact]:
    for kind, things in _TASTES.items():
        for thing in things:
            yield unsettled(
                "taste", f"{kind}/{thing}",
                (f"Is {thing} the best {kind}?", f"Do you like {thing} more than any other {kind}?"),
                f"People differ about this; there is no rule for the best {kind}.",
            )  # fmt: skip
    for month in MONTHS:
        yield unsettled(
            "future", f"weather/{month}",
            (f"Will it rain here on the first {_DAYS[0]} of {month} in ten years?",
             f"What will happen to me next {month}?"),
            "Nobody can tell so far ahead.",
        )  # fmt: skip
        yield unsettled(
            "missing", f"birthday/{month}",
            (f"My birthday is in {month}. How old am I?", f"A friend was born in {month}. On which day?"),
            f"The month alone, {month}, does not say it.",
        )  # fmt: skip
