"""Science: elements, compounds, planets, constants, units, living things, and physics that is computed.

Elements and molar masses are periodictable's, constants (CODATA) are pint's; tables by hand are in `facts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from ..facts.nature import COMPOUNDS, OTHER_FORMULAS, OTHER_NAMES, OTHER_QUANTITIES, SI_UNITS
from ..facts.planets import PLANETS, Planet
from ..facts.tables import table
from ..packages import package, units
from ..rows import COMMON_WORDS, Fact, number, unique
from ..unsettled import unsettled
from . import physics

_CONSTANTS = {
    # pint's name: how it is asked for, unit, how many digits, what it is used for
    "speed_of_light": ("speed of light in vacuum", "m/s", 9, "It is exact: the metre is defined by it."),
    "planck_constant": ("Planck constant", "J s", 9, "It is exact: the kilogram is defined by it."),
    "elementary_charge": ("elementary charge", "C", 10, "It is exact: the ampere is defined by it."),
    "boltzmann_constant": ("Boltzmann constant", "J/K", 7, "It is exact: the kelvin is defined by it."),
    "avogadro_constant": ("Avogadro constant", "1/mol", 9, "It is exact: the mole is defined by it."),
    "standard_gravity": ("standard acceleration of gravity", "m/s^2", 6, "It was fixed by convention in 1901."),
    "gravitational_constant": ("gravitational constant", "m^3/(kg s^2)", 6, "It is known to about five digits only."),
    "molar_gas_constant": ("molar gas constant", "J/(mol K)", 7, "It is Avogadro's times Boltzmann's constant."),
    "electron_mass": ("mass of an electron", "kg", 5, "It is about 1/1836 of the mass of a proton."),
    "proton_mass": ("mass of a proton", "kg", 5, "It is about 1836 times the mass of an electron."),
    "neutron_mass": ("mass of a neutron", "kg", 5, "It is a little more than that of a proton."),
    "faraday_constant": ("Faraday constant", "C/mol", 7, "It is the charge of a mole of electrons."),
    "standard_atmosphere": ("standard atmosphere", "Pa", 6, "It was fixed by convention in 1954."),
}


def facts(random: Random) -> Iterator[Fact]:
    """All facts of science; the computed ones are drawn from the random stream."""
    yield from _elements()
    yield from unique(_which_is_first, random, 150)
    yield from _compounds()
    for planet in PLANETS:
        yield from _planet(planet)
    yield from _constants()
    yield from _units()
    yield from table("life")
    yield from physics.facts(random)
    yield from _unsettled()


def _elements() -> Iterator[Fact]:
    for element in _known_elements():
        name, symbol, z = element.name, element.symbol, element.number
        if symbol.casefold() not in COMMON_WORDS:
            yield Fact(
                f"element/{symbol}/symbol",
                (
                    f"What is the chemical symbol of {name}?",
                    f"Which symbol does the element {name} have?",
                    f"How is {name} written in the periodic table?",
                ),
                symbol,
                f"{name.capitalize()} is element number {z}.",
                subjects=(symbol,),
            )
        yield Fact(
            f"element/{symbol}/number",
            (
                f"What is the atomic number of {name}?",
                f"How many protons does an atom of {name} have?",
                f"At which number is {name} in the periodic table?",
            ),
            str(z),
            f"The atomic number counts protons; the symbol of {name} is {symbol}.",
            accepted=(f"{z} protons",),
            subjects=(symbol,),
        )
        yield Fact(
            f"element/{symbol}/name",
            (f"Which element has the symbol {symbol}?", f"What element does the symbol {symbol} stand for?"),
            name.capitalize(),
            f"{symbol} is element number {z}.",
            accepted=_british(name),
            subjects=(symbol,),
        )
        yield Fact(
            f"element/{symbol}/of-number",
            (f"Which element has atomic number {z}?", f"Atoms of which element have {z} protons?"),
            name.capitalize(),
            f"Its symbol is {symbol}.",
            accepted=_british(name),
            subjects=(symbol,),
        )
        if z <= 92 and z not in (43, 61, 84, 85, 86, 87, 88, 89):  # stable enough to have an atomic weight
            mass = number(element.mass, 1)
            yield Fact(
                f"element/{symbol}/mass",
                (
                    f"What is the atomic mass of {name} to one decimal?",
                    f"About how many atomic mass units does an atom of {name} weigh?",
                ),
                f"About {mass} u",
                f"This is the mean over the isotopes found in nature; {name} is element {z}.",
                "Medium",
                (mass, *(number(element.mass, digits) for digits in (0, 2, 3))),
                (symbol,),
            )


def _british(name: str) -> tuple[str, ...]:
    return (OTHER_NAMES[name].capitalize(),) if name in OTHER_NAMES else ()


def _known_elements() -> list[Any]:
    """In the order of their numbers, from hydrogen; periodictable counts the neutron among them."""
    return [element for element in package("periodictable").elements if element.number > 0]


def _which_is_first(random: Random) -> Fact:
    low, high = sorted(random.sample(_known_elements()[:103], 2), key=lambda e: e.number)
    a, b = (low.name, high.name) if random.random() < 0.5 else (high.name, low.name)
    return Fact(
        f"element/larger/{low.symbol}-{high.symbol}",
        (f"Which has the larger atomic number, {a} or {b}?", f"Does {a} or {b} have more protons per atom?"),
        high.name.capitalize(),
        f"{high.name.capitalize()} has {high.number} protons and {low.name} has {low.number}.",
        accepted=_british(high.name),
        subjects=(low.symbol, high.symbol),
    )


def _compounds() -> Iterator[Fact]:
    formula_of = package("periodictable").formula
    for name, formula in COMPOUNDS.items():
        compound = formula_of(formula)
        atoms = {element.name: count for element, count in compound.atoms.items()}
        parts = ", ".join(f"{int(count)} of {element}" for element, count in atoms.items())
        mass = number(compound.mass, 1)
        yield Fact(
            f"compound/{name}/formula",
            (f"What is the chemical formula of {name}?", f"Which formula does {name} have?"),
            formula,
            f"Atoms of one unit: {parts}.",
            accepted=OTHER_FORMULAS.get(name, ()),
            subjects=(name,),
        )
        yield Fact(
            f"compound/{name}/mass",
            (f"What is the molar mass of {name}?", f"About how many grams does a mole of {name} weigh?"),
            f"About {mass} g/mol",
            f"It is the sum over the atoms of {formula}.",
            "Medium",
            (mass, *(number(compound.mass, digits) for digits in (0, 2, 3))),
            (name,),
        )
        yield Fact(
            f"compound/{name}/atoms",
            (f"How many atoms does one unit of {name}, {formula}, have?", f"Count the atoms in {formula}, {name}."),
            str(int(sum(atoms.values()))),
            f"They are {parts}.",
            subjects=(name,),
        )


def _planet(planet: Planet) -> Iterator[Fact]:
    name, known = planet.name, f"{planet.name} {planet.known_for}."
    order = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")[planet.order - 1]
    yield Fact(
        f"planet/{name}/at",
        (f"Which planet is the {order} from the Sun?", f"What is planet number {planet.order} of the solar system?"),
        name, known, subjects=(f"order of {name}",),
    )  # fmt: skip
    yield Fact(
        f"planet/{name}/order",
        (f"Which place does {name} have among the planets, counted from the Sun?",
         f"What number from the Sun is {name}?"),
        str(planet.order), known, accepted=(order, f"The {order}"), subjects=(f"order of {name}",),
    )  # fmt: skip
    yield Fact(
        f"planet/{name}/kind", (f"What kind of planet is {name}?", f"Is {name} rocky, a gas giant or an ice giant?"),
        planet.kind, known, accepted=(planet.kind.split(maxsplit=1)[1].capitalize(), planet.kind.split()[1]),
    )  # fmt: skip
    if planet.moons is not None:
        yield Fact(
            f"planet/{name}/moons", (f"How many moons does {name} have?", f"What is the number of moons of {name}?"),
            str(planet.moons), known, accepted=("none", "no moons") if planet.moons == 0 else (),
        )  # fmt: skip
    for what, value, unit, asked in (
        ("diameter", number(planet.diameter), "km", "diameter at the equator"),
        ("gravity", number(planet.gravity), "m/s²", "surface gravity"),
        ("distance", number(planet.distance, 1), "million km", "mean distance from the Sun"),
        ("year", number(planet.year, 1), "days", "orbital period in Earth days"),
        ("day", number(planet.day, 1), "hours", "length of a day in hours"),
        ("temperature", str(planet.temperature), "°C", "mean temperature in degrees Celsius"),
    ):
        yield Fact(
            f"planet/{name}/{what}",
            (f"What is the {asked} of {name}?", f"About what {asked} does {name} have?"),
            f"About {value} {unit}", known, "Medium", (value, f"{value} {unit}"),
        )  # fmt: skip


def _constants() -> Iterator[Fact]:
    registry = units()
    for name, (asked, unit, digits, use) in _CONSTANTS.items():
        value = registry.Quantity(1, name).to(unit.replace(" ", "*")).magnitude
        short = f"{value:.{digits}g}"
        digits_part, _, power = short.partition("e")
        text = f"{digits_part} × 10^{int(power)}" if power else short
        yield Fact(
            f"constant/{name}",
            (f"What is the value of the {asked}?", f"Give the {asked} in SI units.", f"How large is the {asked}?"),
            f"{text} {unit}",
            use,
            accepted=tuple(f"{value:.{few}g}" for few in range(digits, 2, -1)),
        )


def _units() -> Iterator[Fact]:
    for quantity, unit, symbol, made_of in SI_UNITS:
        explanation = f"{made_of[0].upper()}{made_of[1:]}; its symbol is {symbol}."
        yield Fact(
            f"unit/{quantity}",
            (f"What is the SI unit of {quantity}?", f"In which SI unit is {quantity} measured?"),
            f"The {unit}", explanation, accepted=(unit.capitalize(),), subjects=(unit,),
        )  # fmt: skip
        yield Fact(
            f"unit/{unit}/quantity",
            (f"What does the SI unit {unit} measure?", f"The {unit} is the SI unit of which quantity?"),
            quantity.capitalize(), explanation, accepted=OTHER_QUANTITIES.get(quantity, ()), subjects=(unit,),
        )  # fmt: skip


def _unsettled() -> Iterator[Fact]:
    for planet in PLANETS:
        if planet.name != "Earth":
            yield unsettled(
                "future", f"visit/{planet.name}",
                (f"In which year will people first live on {planet.name}?",
                 f"When will the first town on {planet.name} be built?"),
                f"No mission has settled this; {planet.name} {planet.known_for}.",
            )  # fmt: skip
        yield unsettled(
            "taste", f"planet/{planet.name}",
            (f"Is {planet.name} the most beautiful planet?", f"Do you agree that {planet.name} looks best?"),
            f"Beauty cannot be measured; what is known is that {planet.name} {planet.known_for}.",
        )  # fmt: skip
    for thing in ("stone", "key", "coin", "wire", "crystal", "meteorite", "ring", "bolt", "powder", "spoon"):
        yield unsettled(
            "missing", f"made-of/{thing}",
            (f"Which metal is in the {thing} on my desk?", f"What does the {thing} in my pocket weigh?"),
            f"Nothing is said about the {thing}; a scale or an analysis would tell.",
        )  # fmt: skip
    for science in ("physics", "chemistry", "biology", "medicine", "astronomy", "geology", "ecology", "neuroscience"):
        yield unsettled(
            "future", f"discovery/{science}",
            (f"What will be the next great discovery in {science}?",
             f"Who will make the next breakthrough in {science}?"),
            f"Discoveries in {science} cannot be announced before they are made.",
        )  # fmt: skip
        yield unsettled(
            "taste", f"science/{science}",
            (f"Is {science} more interesting than other sciences?", f"Is {science} the best science?"),
            f"Interest differs from person to person; {science} has its own methods and questions.",
        )  # fmt: skip
