"""The eight planets. Source: NASA Planetary Fact Sheet (nssdc.gsfc.nasa.gov/planetary/factsheet) and, for moons, the
NASA Solar System Exploration pages; moons of the giant planets are left out, their number grows every year."""

from __future__ import annotations

from typing import NamedTuple


class Planet(NamedTuple):
    """One planet; numbers as the fact sheet rounds them."""

    name: str
    order: int
    diameter: int
    """km at the equator."""
    gravity: float
    """m/s2."""
    distance: float
    """From the Sun, millions of km."""
    year: float
    """Orbital period, days."""
    day: float
    """Length of a day, hours."""
    temperature: int
    """Mean, degrees Celsius."""
    moons: int | None
    kind: str
    known_for: str


PLANETS = (
    Planet("Mercury", 1, 4879, 3.7, 57.9, 88.0, 4222.6, 167, 0, "A rocky planet", "is the smallest planet"),
    Planet("Venus", 2, 12104, 8.9, 108.2, 224.7, 2802.0, 464, 0, "A rocky planet", "is the hottest planet"),
    Planet(
        "Earth", 3, 12756, 9.8, 149.6, 365.2, 24.0, 15, 1, "A rocky planet", "is the only planet known to have life"
    ),
    Planet(
        "Mars",
        4,
        6792,
        3.7,
        228.0,
        687.0,
        24.7,
        -65,
        2,
        "A rocky planet",
        "has Olympus Mons, the tallest known volcano",
    ),
    Planet("Jupiter", 5, 142984, 23.1, 778.5, 4331.0, 9.9, -110, None, "A gas giant", "is the largest planet"),
    Planet("Saturn", 6, 120536, 9.0, 1432.0, 10747.0, 10.7, -140, None, "A gas giant", "has the brightest rings"),
    Planet("Uranus", 7, 51118, 8.7, 2867.0, 30589.0, 17.2, -195, None, "An ice giant", "is tilted on its side"),
    Planet("Neptune", 8, 49528, 11.0, 4515.0, 59800.0, 16.1, -200, None, "An ice giant", "is the farthest planet"),
)
