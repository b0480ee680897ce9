"""Physics for the science category: quantities computed from others, with numbers drawn from the random stream."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from ..rows import Fact, number, unique


def facts(random: Random) -> Iterator[Fact]:
    """Forty facts of each law."""
    for make in (_force, _ohm, _speed, _density, _kinetic, _power):
        yield from unique(make, random, 40)


def _computed(name: str, questions: tuple[str, ...], value: float, unit: str, explanation: str) -> Fact:
    text = number(value, 3)
    return Fact(f"computed/{name}", questions, f"{text} {unit}", explanation, accepted=(text,))


def _force(random: Random) -> Fact:
    mass, acceleration = random.randint(2, 90), random.randint(2, 25)
    return _computed(
        f"force/{mass}/{acceleration}",
        (f"What force accelerates {mass} kg by {acceleration} m/s²?",
         f"A body of {mass} kg is accelerated by {acceleration} metres per second squared. What is the force?"),
        mass * acceleration, "N", f"Force is mass times acceleration: {mass} times {acceleration}.",
    )  # fmt: skip


def _ohm(random: Random) -> Fact:
    current, resistance = random.randint(2, 20), random.randint(2, 60)
    return _computed(
        f"ohm/{current}/{resistance}",
        (f"What voltage drives {current} A through {resistance} ohms?",
         f"A current of {current} amperes flows through {resistance} ohms. What is the voltage?"),
        current * resistance, "V", f"Voltage is current times resistance: {current} times {resistance}.",
    )  # fmt: skip


def _speed(random: Random) -> Fact:
    speed, seconds = random.randint(3, 60), random.randint(4, 60)
    return _computed(
        f"speed/{speed}/{seconds}",
        (f"What is the speed of a body that goes {speed * seconds} m in {seconds} s?",
         f"A cart rolls {speed * seconds} metres in {seconds} seconds. How fast is it?"),
        speed, "m/s", f"Speed is distance over time: {speed * seconds} over {seconds}.",
    )  # fmt: skip


def _density(random: Random) -> Fact:
    density, volume = random.randint(2, 22), random.randint(3, 90)
    return _computed(
        f"density/{density}/{volume}",
        (f"What is the density of {density * volume} g that fill {volume} cm³?",
         f"A sample of {density * volume} grams has {volume} cubic centimetres. What is its density?"),
        density, "g/cm³", f"Density is mass over volume: {density * volume} over {volume}.",
    )  # fmt: skip


def _kinetic(random: Random) -> Fact:
    mass, speed = 2 * random.randint(1, 40), random.randint(2, 30)
    return _computed(
        f"kinetic/{mass}/{speed}",
        (f"What is the kinetic energy of {mass} kg moving at {speed} m/s?",
         f"A body of {mass} kilograms moves at {speed} metres per second. How much kinetic energy does it have?"),
        mass * speed**2 / 2, "J", f"It is half the mass times the speed squared: {mass // 2} times {speed**2}.",
    )  # fmt: skip


def _power(random: Random) -> Fact:
    volts, amperes = random.choice((5, 9, 12, 24, 48, 110, 120, 230)), random.randint(2, 40)
    return _computed(
        f"power/{volts}/{amperes}",
        (f"What electric power is {amperes} A at {volts} V?",
         f"A device draws {amperes} amperes at {volts} volts. What is its power?"),
        volts * amperes, "W", f"Power is voltage times current: {volts} times {amperes}.",
    )  # fmt: skip
