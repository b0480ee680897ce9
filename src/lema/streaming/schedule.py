"""The order in which units are accessed, as a pure function of counts.

It knows how many units there are and how deep the backward goes; it knows nothing of local data, so
every process that is given the same counts predicts the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import ConfigError


class Phase(Enum):
    """Which sweep an access belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Access:
    """One use of a unit: its number among all units, and the sweep it happens in."""

    unit: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class AccessSchedule:
    """A cycle of accesses that repeats from step to step. It predicts; callers may do otherwise."""

    accesses: tuple[Access, ...]

    @classmethod
    def inference(cls, num_units: int) -> AccessSchedule:
        """0 .. n-1, again and again."""
        return cls(tuple(Access(unit, Phase.FORWARD) for unit in range(num_units)))

    @classmethod
    def training(cls, num_units: int, lowest: int = 0) -> AccessSchedule:
        """0 .. n-1, then n-1 down to `lowest`, the deepest unit a gradient has to reach."""
        if not 0 <= lowest <= num_units:
            raise ConfigError(f"lowest unit {lowest} is outside 0..{num_units}")
        down = tuple(Access(unit, Phase.BACKWARD) for unit in range(num_units - 1, lowest - 1, -1))
        return cls(cls.inference(num_units).accesses + down)

    def only(self, units: frozenset[int]) -> AccessSchedule:
        """The same order with the accesses of other units left out."""
        return AccessSchedule(tuple(access for access in self.accesses if access.unit in units))

    def loads(self, slot_of: dict[int, int]) -> AccessSchedule:
        """The accesses of a steady-state cycle that find their slot holding another unit: the loads.

        Args:
            slot_of: slot of each unit. A cache before this one sees exactly these accesses.
        """
        held: dict[int, int] = {}
        cycles: list[list[Access]] = []
        for _ in range(2):
            loaded = []
            for access in self.accesses:
                slot = slot_of[access.unit]
                if held.get(slot) != access.unit:
                    held[slot] = access.unit
                    loaded.append(access)
            cycles.append(loaded)
        return AccessSchedule(tuple(cycles[1]))

    def position(self, access: Access, start: int = 0) -> int | None:
        """Index in the cycle of the first such access at or after `start`, going round; None if it has none."""
        count = len(self.accesses)
        for step in range(count):
            if self.accesses[(start + step) % count] == access:
                return (start + step) % count
        return None
