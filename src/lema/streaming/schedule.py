"""The order in which units are visited, as a pure function of counts.

It knows how many units there are and how deep the backward goes; it knows nothing of local data, so
every process that is given the same counts predicts the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import ConfigError


class Phase(Enum):
    """Which sweep a visit belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Visit:
    """One use of a unit: its number among all units, and the sweep it happens in."""

    unit: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class Schedule:
    """A cycle of visits that repeats from step to step. It predicts; callers may do otherwise."""

    visits: tuple[Visit, ...]

    @classmethod
    def inference(cls, num_units: int) -> Schedule:
        """0 .. n-1, again and again."""
        return cls(tuple(Visit(unit, Phase.FORWARD) for unit in range(num_units)))

    @classmethod
    def training(cls, num_units: int, lowest: int = 0) -> Schedule:
        """0 .. n-1, then n-1 down to `lowest`, the deepest unit a gradient has to reach."""
        if not 0 <= lowest <= num_units:
            raise ConfigError(f"lowest unit {lowest} is outside 0..{num_units}")
        down = tuple(Visit(unit, Phase.BACKWARD) for unit in range(num_units - 1, lowest - 1, -1))
        return cls(cls.inference(num_units).visits + down)

    def only(self, units: frozenset[int]) -> Schedule:
        """The same order with the visits of other units left out."""
        return Schedule(tuple(visit for visit in self.visits if visit.unit in units))

    def loads(self, slot_of: dict[int, int]) -> Schedule:
        """The visits of a steady-state cycle that find their slot holding another unit: the loads.

        Args:
            slot_of: slot of each unit. A ring before this one sees exactly these visits.
        """
        held: dict[int, int] = {}
        cycles: list[list[Visit]] = []
        for _ in range(2):
            loaded = []
            for visit in self.visits:
                slot = slot_of[visit.unit]
                if held.get(slot) != visit.unit:
                    held[slot] = visit.unit
                    loaded.append(visit)
            cycles.append(loaded)
        return Schedule(tuple(cycles[1]))

    def position(self, visit: Visit, start: int = 0) -> int | None:
        """Index in the cycle of the first such visit at or after `start`, going round; None if it has none."""
        count = len(self.visits)
        for step in range(count):
            if self.visits[(start + step) % count] == visit:
                return (start + step) % count
        return None
