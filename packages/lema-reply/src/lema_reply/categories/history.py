"""History: years of events, what came first, centuries, presidents and monarchs; years between are computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random

from ..facts.events import ABOUT_THEN, EVENTS
from ..facts.rulers import LATER_MONARCHS, MONARCHS, OTHER_SUCCESSORS, PRESIDENTS
from ..rows import Fact, unique
from ..unsettled import unsettled

_PEOPLE = (
    "Julius Caesar", "Cleopatra", "Charlemagne", "Joan of Arc", "Columbus", "Leonardo da Vinci", "Shakespeare",
    "Newton",
    "Mozart", "Napoleon", "Queen Victoria", "Abraham Lincoln", "Marie Curie", "Einstein", "Galileo", "Genghis Khan",
    "Marco Polo", "Socrates", "Confucius", "Gutenberg",
)  # fmt: skip


def facts(random: Random) -> Iterator[Fact]:
    """All facts of history; pairs are drawn from the random stream."""
    for event, year in EVENTS.items():
        yield from _event(event, year)
    for event, year in ABOUT_THEN.items():
        said = _year(year)
        yield Fact(
            f"about/{event}",
            (f"In about which year was {event}?", f"About when was {event}?", f"Roughly what is the date of {event}?"),
            f"About {said}",
            "It can only be estimated, or is a date that historians agreed on.",
            "Medium",
            (said, str(abs(year)), f"Around {said}", *((f"About {-year} BC", f"{-year} BC") if year < 0 else ())),
        )
    yield from unique(_first, random, 260)
    yield from unique(_between, random, 260)
    yield from unique(_century_of, random, 200)
    yield from unique(_decade, random, 120)
    yield from _presidents()
    yield from _monarchs("England", MONARCHS)
    yield from _monarchs("Britain", LATER_MONARCHS)
    yield from _unsettled()


def _year(year: int) -> str:
    return f"{-year} BCE" if year < 0 else str(year)


def _century(year: int) -> str:
    count = (abs(year) + 99) // 100
    ending = "th" if 10 < count % 100 < 20 else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending} century{' BCE' if year < 0 else ''}"


def _event(event: str, year: int) -> Iterator[Fact]:
    said = _year(year)
    gap, then, near = min((abs(other - year), other, what) for what, other in EVENTS.items() if other != year)
    yield Fact(
        f"year/{event}",
        (f"In which year was {event}?", f"What was the year of {event}?", f"Which year saw {event}?"),
        said,
        f"It was in the {_century(year)}, {_years(gap)} {'before' if year < then else 'after'} {near}.",
        accepted=(f"In {said}", *((f"{-year} BC",) if year < 0 else ())),
        subjects=(event,),
    )
    yield Fact(
        f"century/{event}",
        (f"In which century was {event}?", f"Which century saw {event}?"),
        f"The {_century(year)}",
        f"The year was {said}.",
        accepted=(_century(year),),
        subjects=(event,),
    )


def _years(count: int) -> str:
    return "1 year" if count == 1 else f"{count} years"


def _pair(random: Random) -> tuple[tuple[str, int], tuple[str, int]]:
    while True:
        one, other = random.sample(sorted(EVENTS.items()), 2)
        if one[1] != other[1]:
            return one, other


def _first(random: Random) -> Fact:
    one, other = _pair(random)
    early, late = sorted((one, other), key=lambda event: event[1])
    return Fact(
        f"first/{early[0]}/{late[0]}",
        (f"Which came first, {one[0]} or {other[0]}?", f"Which was earlier: {one[0]} or {other[0]}?"),
        early[0][0].upper() + early[0][1:],
        f"The years are {_year(early[1])} and {_year(late[1])}.",
        subjects=(early[0], late[0]),
    )


def _between(random: Random) -> Fact:
    early, late = sorted(_pair(random), key=lambda event: event[1])
    years = late[1] - early[1] - (1 if early[1] < 0 < late[1] else 0)  # there was no year 0
    return Fact(
        f"between/{early[0]}/{late[0]}",
        (f"How many years lie between {early[0]} and {late[0]}?",
         f"By how many years did {early[0]} come before {late[0]}?"),
        str(years),
        f"The years are {_year(early[1])} and {_year(late[1])}, counted without months.",
        accepted=(_years(years),),
        subjects=(early[0], late[0]),
    )  # fmt: skip


def _century_of(random: Random) -> Fact:
    year = random.randint(101, 2020)
    last = (year + 99) // 100 * 100
    return Fact(
        f"century/{year}",
        (f"To which century does the year {year} belong?", f"In which century was {year}?"),
        f"The {_century(year)}",
        f"That century ran from {last - 99} to {last}.",
        accepted=(_century(year),),
    )


def _decade(random: Random) -> Fact:
    year = random.randint(1500, 2020)
    return Fact(
        f"decade/{year}",
        (f"Which decade does the year {year} belong to?", f"In which decade was {year}?"),
        f"The {year // 10 * 10}s",
        f"It is in the {_century(year)}.",
        accepted=(f"{year // 10 * 10}s",),
    )


def _short(name: str) -> tuple[str, ...]:
    """Shorter forms of a president's name that are nobody else's."""
    others = {form for other, _ in PRESIDENTS if other != name for form in (other, *_last_and_first(other))}
    return tuple(form for form in _last_and_first(name) if form != name and form not in others)


def _last_and_first(name: str) -> tuple[str, str]:
    first, *_, last = name.split()
    return last, f"{first} {last}"


def _presidents() -> Iterator[Fact]:
    times = Counter(name for name, _ in PRESIDENTS)
    for index, (name, year) in enumerate(PRESIDENTS):
        count = index + 1
        ordinal = _century(count * 100).removesuffix(" century")
        yield Fact(
            f"president/{count}/name",
            (f"Who was the {ordinal} president of the United States?",
             f"Which person was US president number {count}?"),
            name, f"The term began in {year}.", accepted=_short(name), subjects=(f"president {count}",),
        )  # fmt: skip
        if times[name] > 1:
            continue
        yield Fact(
            f"president/{count}/year",
            (f"In which year did {name} become US president?", f"When did the presidency of {name} begin?"),
            str(year), f"This was the {ordinal} president of the United States.", accepted=(f"In {year}",),
            subjects=(f"president {count}",),
        )  # fmt: skip
        if index:
            before = PRESIDENTS[index - 1][0]
            yield Fact(
                f"president/{count}/before",
                (f"Which US president came right before {name}?", f"Who was US president immediately before {name}?"),
                before, f"{name} followed in {year}.", accepted=_short(before),
                subjects=(f"president {count - 1}", f"president {count}"),
            )  # fmt: skip
        if index + 1 < len(PRESIDENTS):
            after, then = PRESIDENTS[index + 1]
            yield Fact(
                f"president/{count}/after",
                (f"Which US president came right after {name}?", f"Who followed {name} as US president?"),
                after, f"That term began in {then}.", accepted=_short(after),
                subjects=(f"president {count}", f"president {count + 1}"),
            )  # fmt: skip


def _monarchs(country: str, monarchs: Sequence[tuple[str, int]]) -> Iterator[Fact]:
    for (name, year), (later, then) in pairwise(monarchs):
        yield Fact(
            f"monarch/{country}/{name}/year",
            (f"In which year did {name} come to the throne of {country}?",
             f"When did the reign of {name} in {country} begin?"),
            str(year), f"{later} followed in {then}.", accepted=(f"In {year}",), subjects=(name, later),
        )  # fmt: skip
        yield Fact(
            f"monarch/{country}/{name}/next",
            (f"Who followed {name} on the throne of {country}?", f"Which monarch of {country} came after {name}?"),
            later, f"{later} came to the throne in {then}.", accepted=OTHER_SUCCESSORS.get(name, ()),
            subjects=(name, later),
        )  # fmt: skip


def _unsettled() -> Iterator[Fact]:
    for person in _PEOPLE:
        yield unsettled(
            "lost", f"breakfast/{person}",
            (f"What did {person} have for breakfast on a twelfth birthday?",
             f"What was {person} thinking on a first day of school?"),
            f"Nobody wrote this down about {person}, as far as is known.",
        )  # fmt: skip
        yield unsettled(
            "lost", f"whatif/{person}",
            (f"What would the world be like if {person} had never lived?",
             f"How would history have gone without {person}?"),
            "What did not happen leaves no records; one can only guess.",
        )  # fmt: skip
        yield unsettled(
            "taste", f"greatest/{person}",
            (f"Was {person} the greatest person in history?", f"Is {person} the most important figure of all time?"),
            f"Greatness has no measure; what {person} did is recorded, its worth is judged.",
        )  # fmt: skip
