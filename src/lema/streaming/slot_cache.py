"""Slots filled ahead of use: the slot protocol, once, for every tier.

The cache knows slots, accesses and uses. It knows nothing of disks, devices or what a unit means: `fill`
does the moving, and reports back with `finished`.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from ..errors import StreamingError
from .schedule import Access, AccessSchedule, Phase

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


class SlotState(Enum):
    """Life of a slot. DIRTY and WRITEBACK will come with weights that change."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    IN_USE = "in use"


@dataclass(eq=False, slots=True)
class Load:
    """One filling of a slot with a unit for an access of a phase, over what the `evicted` unit left there.

    `cancelled` asks the filler to stop early; it must still report.
    """

    unit: int
    slot: int
    phase: Phase
    evicted: int | None = None
    cancelled: bool = False


@dataclass(slots=True)
class Slot:
    """State of one slot; `uses` counts planned accesses that have not begun yet, `fillings` loads begun."""

    state: SlotState = SlotState.EMPTY
    unit: int | None = None
    uses: int = 0
    fillings: int = 0
    load: Load | None = field(default=None, repr=False)


class SlotCache:
    """Slots that hold the units of the next accesses.

    Layout: unit u lives in slot `slot_of[u]`, its rank among the streamed units modulo the number of
    slots. The schedule's cycle repeats without end; `_next_use` counts accesses that have begun and
    `_next_plan` accesses that have been given a place, at most `depth` ahead.

    Mechanics: planning goes through the accesses in order. An access whose slot already holds (or loads)
    its unit adds one use to it. Otherwise the slot is loaded as soon as nothing that was planned
    before still needs it: no planned use left, not in use. So a load serves exactly the uses planned
    before the next load of that slot, and is never overwritten earlier. An access that was not predicted
    moves the plan to where it fits: planned uses are forgotten, loads nobody will use are cancelled,
    what slots hold stays usable. An error of a load leaves the slot empty and goes to the access that the
    load was planned for; until it is there, nothing more is planned. Every wait ends: by the load, by its
    error, or by `close`.

    Args:
        slot_of: slot number of every unit this cache may be asked for.
        schedule: predicted accesses; only units of `slot_of`.
        depth: accesses planned ahead of the current one; 0 loads on demand, None is bounded by the slots alone.
        fill: starts to fill a slot and returns; called with the cache's lock held, so it must not block
            nor call back.
    """

    def __init__(
        self, slot_of: dict[int, int], schedule: AccessSchedule, depth: int | None, fill: Callable[[Load], None]
    ) -> None:
        self.slot_of = slot_of
        self.slots = [Slot() for _ in range(max(slot_of.values(), default=-1) + 1)]
        self.depth = sys.maxsize - 1 if depth is None else depth
        self.loads = 0
        self.wait_seconds = 0.0
        self.on_overwrite: Callable[[Load], None] = _nothing
        """Called just before a slot starts to be filled."""
        self.learns = True
        """Whether accesses that were not predicted are expected again in later cycles."""
        self._fill = fill
        self._schedule = self._predicted = schedule
        self._next_use = 0
        self._next_plan = 0
        self._errors: dict[int, BaseException] = {}
        self._closed = False
        self._aborting = False
        self._changed = threading.Condition(threading.RLock())

    # -- the user's side -------------------------------------------------------------------------

    def predict(self, schedule: AccessSchedule) -> bool:
        """Expect a cycle of accesses from its start on; False where just that was expected already."""
        with self._changed:
            at_start = bool(schedule.accesses) and self._next_use % len(schedule.accesses) == 0
            if schedule == self._schedule and at_start:
                return False
            self._schedule = self._predicted = schedule
            self._replan(0)
            return True

    def acquire(self, unit: int, phase: Phase = Phase.FORWARD) -> int:
        """Slot that holds the unit, blocking until it does; the slot is the caller's until `release`.

        Raises:
            StreamingError: the unit is in use already, its slot is held by another unit in use, or the
                cache is closed.
            ReadError: filling the slot failed; asking again tries again.
        """
        slot = self.slots[self.slot_of[unit]]
        with self._changed:
            self._check_open()
            if slot.state is SlotState.IN_USE:
                raise StreamingError(
                    f"unit {unit} was asked for while unit {slot.unit} is in use in its slot: release it first"
                )
            access = Access(unit, phase)
            started = time.perf_counter()
            self._seek(access)
            self._plan(least=1)
            while not (slot.state is SlotState.READY and slot.unit == unit and self._next_plan > self._next_use):
                if unit in self._errors:
                    error = self._errors.pop(unit)
                    self._replan(self._next_use)
                    raise error
                self._changed.wait(_POLL_SECONDS)
                self._check_open()
                self._seek(access)  # somebody may have predicted anew in the meantime
                self._plan(least=1)
            self.wait_seconds += time.perf_counter() - started
            slot.state = SlotState.IN_USE
            slot.uses -= 1
            self._next_use += 1
            self._plan()
            return self.slot_of[unit]

    def release(self, unit: int) -> None:
        """Say that a use of the unit is spent."""
        slot = self.slots[self.slot_of[unit]]
        with self._changed:
            if slot.state is not SlotState.IN_USE or slot.unit != unit:
                raise StreamingError(f"unit {unit} was released but is not in use (slot: {slot.state.value})")
            slot.state = SlotState.READY
            self._plan()
            self._changed.notify_all()

    def prefetch(self, unit: int, phase: Phase = Phase.FORWARD) -> None:
        """Start to load a unit that will be asked for soon, whatever the depth; does not wait."""
        with self._changed:
            self._check_open()
            self._seek(Access(unit, phase))
            self._plan(least=1)

    def generation(self, unit: int) -> int:
        """How often the unit's slot has been filled so far."""
        return self.slots[self.slot_of[unit]].fillings

    def evict(self) -> bool:
        """Empty every slot that nobody uses or is about to use; True if all are empty now, so that memory may go."""
        with self._changed:
            for slot in self.slots:
                if slot.state is SlotState.READY and slot.uses == 0:
                    slot.state, slot.unit = SlotState.EMPTY, None
            return all(slot.state is SlotState.EMPTY for slot in self.slots)

    def abort(self) -> None:
        """Forget plans and errors and cancel what is being loaded; returns when no load is under way."""
        with self._changed:
            self._aborting = True
            try:
                self._replan(0)
                self._cancel_loads()
                while any(slot.state is SlotState.LOADING for slot in self.slots):
                    self._changed.wait(_POLL_SECONDS)
            finally:
                self._aborting = False
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse further accesses and wake everyone who waits."""
        with self._changed:
            self._closed = True
            self._cancel_loads()
            self._fill = self.on_overwrite = _nothing  # no circle with the filler, whose slots go with its last user
            self._changed.notify_all()

    # -- the filler's side -----------------------------------------------------------------------

    def finished(self, load: Load, error: BaseException | None = None) -> None:
        """Report the end of a load: filled, failed, or given up because it was cancelled."""
        with self._changed:
            slot = self.slots[load.slot]
            if slot.load is not load and load.cancelled:  # an interrupt came between its start and its entry here
                return
            assert slot.load is load and slot.state is SlotState.LOADING, "a load reported to a slot it does not own"
            slot.load = None
            if error is None and not load.cancelled:
                slot.state = SlotState.READY
            else:
                if error is not None and not load.cancelled and slot.uses:
                    self._errors[load.unit] = error
                slot.state, slot.unit, slot.uses = SlotState.EMPTY, None, 0
            self._plan()
            self._changed.notify_all()

    # -- planning --------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StreamingError("the weight store is closed: no more weights can be asked for")

    def _access(self, number: int) -> Access:
        return self._schedule.accesses[number % len(self._schedule.accesses)]

    def _seek(self, access: Access) -> None:
        if self._schedule.accesses and self._access(self._next_use) == access:
            return
        start = self._next_use % len(self._schedule.accesses) if self._schedule.accesses else 0
        position = self._schedule.position(access, start)
        if position is None:
            known = self._schedule if self.learns else self._predicted
            self._schedule = AccessSchedule((*known.accesses, access))
            position = len(self._schedule.accesses) - 1
        logger.debug("unpredicted access of unit %d (%s): replanning", access.unit, access.phase.value)
        self._replan(position)

    def _replan(self, position: int) -> None:
        self._next_use = self._next_plan = position
        self._errors.clear()
        wanted: dict[int, int] = {}
        for ahead in range(min(self.depth + 1, len(self._schedule.accesses))):
            unit = self._access(position + ahead).unit
            wanted.setdefault(self.slot_of[unit], unit)
        for number, slot in enumerate(self.slots):
            slot.uses = 0
            if slot.load is not None and wanted.get(number) != slot.unit:
                slot.load.cancelled = True
        self._plan()

    def _plan(self, least: int = 0) -> None:
        """Give the next accesses their slots and start loads, as far as depth and slots allow.

        `least` is how many accesses not yet begun may be planned whatever the depth.
        """
        if self._closed or self._aborting or self._errors:
            return
        horizon = self._next_use + max(min(self.depth, len(self._schedule.accesses)), least)
        while self._next_plan < horizon:
            access = self._access(self._next_plan)
            unit, number = access.unit, self.slot_of[access.unit]
            slot = self.slots[number]
            if slot.unit == unit and not (slot.load is not None and slot.load.cancelled):
                slot.uses += 1
            elif slot.uses == 0 and slot.state in (SlotState.EMPTY, SlotState.READY):
                load = Load(unit, number, access.phase, evicted=slot.unit)
                try:
                    slot.state, slot.unit, slot.uses, slot.load = SlotState.LOADING, unit, 1, load
                    slot.fillings += 1
                    self.loads += 1
                    self.on_overwrite(load)
                    self._fill(load)
                except BaseException:  # an interrupt may come after it was handed over: the rest of it is not read
                    load.cancelled = True
                    slot.state, slot.unit, slot.uses, slot.load = SlotState.EMPTY, None, 0, None
                    raise
            else:
                return
            self._next_plan += 1

    def _cancel_loads(self) -> None:
        for slot in self.slots:
            if slot.load is not None:
                slot.load.cancelled = True


def _nothing(load: Load) -> None:
    """Called where nobody wants to know of a load."""
