"""The slot protocol against a model of it: no early read, no overwrite in use, no wait without end.

Most tests drive the cache in one thread: its condition's `wait` is replaced by a script that does what other
threads might do just then. So every order of events can be had, and a wait that nobody would end is seen at once.
The rest use real threads, with the poll set so long that a missing wake-up counts as a hang.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lema.errors import ReadError, StreamingError
from lema.streaming import slot_cache as cache_module
from lema.streaming.schedule import Access, AccessSchedule, Phase
from lema.streaming.slot_cache import Load, SlotCache, SlotState

pytestmark = pytest.mark.timeout(60)

F, B = Phase.FORWARD, Phase.BACKWARD
EMPTY = AccessSchedule(())


def schedule(text: str) -> AccessSchedule:
    """`F0 F1 B1 B0` as a schedule."""
    phases = {"F": F, "B": B}
    return AccessSchedule(tuple(Access(int(word[1:]), phases[word[0]]) for word in text.split()))


# --- a cache in one thread, and the model it is held against -----------------------------------------


class ScriptedCondition(threading.Condition):
    """A condition whose wait runs a script in the waiting thread, which holds the (reentrant) lock."""

    def __init__(self, script: Callable[[], None]) -> None:
        super().__init__(threading.RLock())
        self.script = script

    def wait(self, timeout: float | None = None) -> bool:
        self.script()
        return True


@dataclass
class World:
    """A cache, the bytes of its slots as "which unit is in there, whole", and what the protocol allows now.

    The model follows the words of the protocol, not the cache's bookkeeping: a slot may be filled with a unit
    only if the next access that needs the slot, counted from the last one that began, is an access of that unit.
    """

    slot_of: dict[int, int]
    predicted: AccessSchedule
    depth: int
    script: Iterator[tuple[str, int]] = field(default_factory=lambda: iter(()))
    """What happens in each wait; when it has run out, the oldest load ends well."""
    others: list[AccessSchedule] = field(default_factory=list)
    """Schedules that may be predicted by somebody else during a wait."""

    def __post_init__(self) -> None:
        self.cycle = self.predicted.accesses
        self.position = 0
        self.whole: dict[int, int] = {}
        self.under_way: dict[int, Load] = {}
        self.in_use: dict[int, int] = {}
        self.failed: dict[int, list[ReadError]] = {}
        self.surfaces: set[int] = set()
        self.began: dict[Load, int] = {}
        self.plans = 0
        self.planning = False
        self.asked: Access | None = None
        self.may_wait = self.may_fill = True
        self.fills: list[Load] = []
        self.announced: Load | None = None
        self.cache = SlotCache(self.slot_of, self.predicted, self.depth, self.fill)
        self.cache._changed = ScriptedCondition(self.while_waiting)
        self.cache.on_overwrite = self.announce

    # -- what the cache calls

    def announce(self, load: Load) -> None:
        self.announced = load

    def fill(self, load: Load) -> None:
        slot = load.slot
        assert self.announced is load, "on_overwrite comes right before the filling"
        assert self.may_fill, "a load was started by a cache that is being stopped"
        assert slot == self.slot_of[load.unit]
        assert slot not in self.in_use, "a slot is overwritten while it is in use"
        assert slot not in self.under_way, "a slot is filled twice at once"
        assert self.whole.get(slot) != load.unit, "a unit is loaded although it is there"
        assert load.evicted == self.whole.get(slot), "on_overwrite must be told what goes"
        distance = self.needed_in(slot, load.unit)
        assert distance is not None, "a slot is overwritten although an access before needs what it holds"
        furthest = self.depth if self.asked else self.depth - 1
        assert distance <= furthest or (distance == 0 and self.asked), "a load was started beyond the depth"
        self.whole.pop(slot, None)
        self.under_way[slot] = load
        self.began[load] = self.plans
        self.fills.append(load)

    def while_waiting(self) -> None:
        assert self.may_wait, "an error that is certain must be raised without waiting"
        assert self.under_way, f"waits for {self.asked} and nothing is under way: {self.cache.slots}"
        self.check()
        kind, number = next(self.script, ("finish", 0))
        if kind == "predict" and self.others and self.asked:
            self.predict(self.others[number % len(self.others)])
            self.seek(self.asked)
        elif kind == "interrupt":
            raise KeyboardInterrupt
        else:
            self.end(number, fail=kind == "fail")

    # -- the model

    def ahead(self) -> Iterator[Access]:
        for step in range(len(self.cycle)):
            yield self.cycle[(self.position + step) % len(self.cycle)]

    def needed_in(self, slot: int, unit: int) -> int | None:
        """How many accesses ahead the slot is needed for this unit, if for no other before."""
        for distance, access in enumerate(self.ahead()):
            if self.slot_of[access.unit] == slot:
                return distance if access.unit == unit else None
        return None

    def next_access(self) -> Access:
        return next(self.ahead(), Access(min(self.slot_of), F))

    def seek(self, access: Access) -> None:
        if self.cycle and self.next_access() == access:
            return
        position = AccessSchedule(self.cycle).position(access, self.position % len(self.cycle) if self.cycle else 0)
        if position is None:
            self.cycle = (*self.cycle, access)
            position = len(self.cycle) - 1
        self.plan_anew(position)

    def plan_anew(self, position: int) -> None:
        self.position = position
        self.plans += 1
        self.failed.clear()
        self.surfaces.clear()

    def check(self) -> None:
        """What holds between any two events."""
        assert self.cache.loads == len(self.fills)
        for slot, load in self.under_way.items():
            if not load.cancelled:
                distance = self.needed_in(slot, load.unit)
                assert distance is not None and distance <= self.depth, "a load nobody will use was not cancelled"
        if self.failed or not self.planning or self.asked:
            return
        earlier: set[int] = set()
        for access in list(self.ahead())[: self.depth]:
            slot = self.slot_of[access.unit]
            load = self.under_way.get(slot)
            expected = self.whole.get(slot) if load is None else load.unit if not load.cancelled else None
            if expected != access.unit:
                blocked = slot in self.in_use or load is not None or slot in earlier
                assert blocked, f"{access} is due within the depth, its slot is idle and nothing was started"
                return
            earlier.add(slot)

    # -- what the user and the filler do

    def acquire(self, unit: int, phase: Phase = F) -> bool:
        """Ask for an access; whether it began. Errors of the load are checked against those injected."""
        access = Access(unit, phase)
        self.seek(access)
        self.asked, self.planning = access, True
        failure = None
        try:
            slot = self.cache.acquire(unit, phase)
        except ReadError as error:
            failure = error
        except KeyboardInterrupt:
            return False
        finally:
            self.asked = None
        if failure is not None:
            assert failure in self.failed.get(unit, ()), "an error came to an access that did not want the unit"
            self.plan_anew(self.position)
            return False
        assert slot == self.slot_of[unit]
        assert slot not in self.under_way and self.whole.get(slot) == unit, "read before full, or stale"
        assert unit not in self.surfaces, "an error was swallowed"
        self.in_use[slot] = unit
        self.position += 1
        self.check()
        return True

    def release(self, unit: int) -> None:
        del self.in_use[self.slot_of[unit]]
        self.planning = True
        self.cache.release(unit)
        self.check()

    def use(self, unit: int, phase: Phase = F) -> bool:
        if not self.acquire(unit, phase):
            return False
        self.release(unit)
        return True

    def end(self, number: int, fail: bool = False) -> None:
        """End one of the loads under way."""
        slot, load = sorted(self.under_way.items())[number % len(self.under_way)]
        del self.under_way[slot]
        error = ReadError(f"unit {load.unit}") if fail else None
        if error is None and not load.cancelled:
            self.whole[slot] = load.unit
        elif error is not None and not load.cancelled:
            self.failed.setdefault(load.unit, []).append(error)
            if self.began[load] == self.plans:
                self.surfaces.add(load.unit)
        self.cache.finished(load, error)
        self.check()

    def predict(self, predicted: AccessSchedule) -> None:
        expected = predicted.accesses == self.cycle and bool(self.cycle) and self.position % len(self.cycle) == 0
        if not expected:
            self.cycle = predicted.accesses
            self.plan_anew(0)
            self.planning = True
        assert self.cache.predict(predicted) is not expected
        self.check()

    def prefetch(self, unit: int, phase: Phase) -> None:
        access = Access(unit, phase)
        self.seek(access)
        self.asked, self.planning, self.may_wait = access, True, False
        self.cache.prefetch(unit, phase)
        self.asked, self.may_wait = None, True
        slot = self.slot_of[unit]
        busy = slot in self.in_use or slot in self.under_way
        assert busy or self.failed or self.whole.get(slot) == unit, "nothing was started though the slot is idle"
        self.check()

    def evict(self) -> bool:
        empty = self.cache.evict()
        for slot in [slot for slot in self.whole if slot not in self.in_use]:
            if self.cache.slots[slot].state is SlotState.EMPTY:
                del self.whole[slot]
            else:
                assert self.needed_in(slot, self.whole[slot]) is not None, "what nobody will use was kept"
        assert empty == (not self.whole and not self.under_way), "memory may go only when nothing is in it"
        self.check()
        return empty

    def abort(self) -> None:
        self.may_fill = self.planning = False
        self.plan_anew(0)
        try:
            self.cache.abort()
        except KeyboardInterrupt:
            assert all(load.cancelled for load in self.under_way.values())
        else:
            assert not self.under_way, "abort returned while a load was under way"
        self.may_fill = True
        self.check()

    def misuse(self, call: Callable[..., Any], *args: Any) -> None:
        """A call that must be refused at once and change nothing."""
        before = (list(self.fills), self.cache.slots and [repr(slot) for slot in self.cache.slots])
        self.may_wait = False
        with pytest.raises(StreamingError):
            call(*args)
        self.may_wait = True
        assert before == (list(self.fills), [repr(slot) for slot in self.cache.slots])

    def misuse_everything(self) -> None:
        for unit, slot in self.slot_of.items():
            if slot in self.in_use:
                self.misuse(self.cache.acquire, unit)
                self.misuse(self.cache.acquire, unit, B)
            if self.in_use.get(slot) != unit:
                self.misuse(self.cache.release, unit)

    def close(self) -> None:
        """Close, and see that nothing is started or waited for ever after."""
        self.cache.close()
        self.may_wait = self.may_fill = False
        assert all(load.cancelled for load in self.under_way.values())
        for unit in self.slot_of:
            with pytest.raises(StreamingError, match=r"closed|in use"):
                self.cache.acquire(unit)
        for slot, load in list(self.under_way.items()):
            del self.under_way[slot]
            self.cache.finished(load)
        for unit in list(self.in_use.values()):
            self.cache.release(unit)
        self.cache.close()


def world(slots: int, units: int, predicted: AccessSchedule | str, depth: int, *script: tuple[str, int]) -> World:
    slot_of = {unit: unit % slots for unit in range(units)}
    return World(slot_of, schedule(predicted) if isinstance(predicted, str) else predicted, depth, iter(script))


# --- any order of events ----------------------------------------------------------------------------


def schedules(units: int) -> st.SearchStrategy[AccessSchedule]:
    accesses = st.builds(Access, st.integers(0, units - 1), st.sampled_from(Phase))
    return st.one_of(
        st.builds(AccessSchedule.training, st.just(units), st.integers(0, units)),
        st.just(AccessSchedule.inference(units)),
        st.lists(accesses, max_size=10).map(lambda chosen: AccessSchedule(tuple(chosen))),
    )


number = st.integers(0, 7)
wait_event = st.tuples(st.sampled_from(["finish", "finish", "finish", "fail", "predict", "interrupt"]), number)
step = st.one_of(
    st.tuples(st.just("next"), st.booleans()),
    st.tuples(st.just("next"), st.booleans()),
    st.tuples(st.just("sweep"), st.integers(1, 12)),
    st.tuples(st.just("access"), number, st.sampled_from(Phase), st.booleans()),
    st.tuples(st.just("release"), number),
    st.tuples(st.just("end"), number),
    st.tuples(st.just("fail"), number),
    st.tuples(st.just("predict"), number),
    st.tuples(st.just("abort")),
    st.tuples(st.just("misuse")),
    st.tuples(st.just("prefetch"), number, st.sampled_from(Phase)),
    st.tuples(st.just("evict")),
)


@settings(max_examples=500, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 8), st.integers(0, 6), st.lists(wait_event, max_size=30))
def test_no_order_of_events_breaks_the_protocol(
    data: st.DataObject, slots: int, units: int, depth: int, script: list[tuple[str, int]]
) -> None:
    predicted = data.draw(st.lists(schedules(units), min_size=1, max_size=3))
    w = World({unit: unit % slots for unit in range(units)}, predicted[0], depth, iter(script), predicted)
    for kind, *values in data.draw(st.lists(step, max_size=40)):
        if kind == "sweep":
            for _ in range(values[0]):
                access = w.next_access()
                if w.slot_of[access.unit] not in w.in_use:
                    w.use(access.unit, access.phase)
        elif kind in ("next", "access"):
            access = w.next_access() if kind == "next" else Access(values[0] % units, values[1])
            if w.slot_of[access.unit] in w.in_use:
                w.misuse(w.cache.acquire, access.unit, access.phase)
            elif w.acquire(access.unit, access.phase) and values[-1]:
                w.release(access.unit)
        elif kind == "release" and w.in_use:
            w.release(sorted(w.in_use.values())[values[0] % len(w.in_use)])
        elif kind in ("end", "fail") and w.under_way:
            w.end(values[0], fail=kind == "fail")
        elif kind == "predict":
            w.predict(predicted[values[0] % len(predicted)])
        elif kind == "abort":
            w.abort()
        elif kind == "misuse":
            w.misuse_everything()
        elif kind == "prefetch":
            w.prefetch(values[0] % units, values[1])
        elif kind == "evict":
            w.evict()
    w.script = iter(())
    for unit in list(w.in_use.values()):
        w.release(unit)
    for unit in range(units):  # whatever happened: asked again and again, every unit comes
        assert any(w.use(unit) for _ in range(3))
    w.close()


# --- what is planned, case by case --------------------------------------------------------------------


def loaded(w: World) -> list[int]:
    return [load.unit for load in w.fills]


def test_accesses_are_read_ahead_as_far_as_depth_and_slots_allow() -> None:
    for depth, ahead in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (6, [0, 1, 2])):
        w = world(3, 6, EMPTY, depth)
        w.predict(AccessSchedule.inference(6))
        assert loaded(w) == ahead
    w.acquire(0)
    assert loaded(w) == [0, 1, 2], "unit 3 needs the slot in use"
    w.release(0)
    assert loaded(w) == [0, 1, 2, 3]


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 8))
def test_depth_0_never_reads_ahead(data: st.DataObject, slots: int, units: int) -> None:
    w = world(slots, units, data.draw(schedules(units)), 0)
    accesses = data.draw(st.lists(st.builds(Access, st.integers(0, units - 1), st.sampled_from(Phase)), max_size=20))
    expected: list[int] = []
    held: dict[int, int] = {}
    for access in accesses:
        if held.get(w.slot_of[access.unit]) != access.unit:
            held[w.slot_of[access.unit]] = access.unit
            expected.append(access.unit)
        w.use(access.unit, access.phase)
        assert loaded(w) == expected


def test_at_the_turn_and_at_the_next_step_the_slots_are_kept() -> None:
    w = world(2, 4, AccessSchedule.training(4), 4)
    for _ in range(3):
        for access in AccessSchedule.training(4).accesses:
            w.use(access.unit, access.phase)
    assert loaded(w)[:12] == [0, 1, 2, 3, 1, 0, 2, 3, 1, 0, 2, 3]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_two_forwards_before_a_backward_and_an_evaluation_in_between(depth: int) -> None:
    w = world(2, 5, EMPTY, depth)
    up, down = [(u, F) for u in range(5)], [(u, B) for u in range(4, -1, -1)]
    for _ in range(2):
        for predicted, accesses in (
            (AccessSchedule.training(5), up + up + down),
            (AccessSchedule.inference(5), up + up),
            (AccessSchedule.training(5, 2), up + down[:3]),
            (AccessSchedule.training(5), up),
            (EMPTY, up + down),
            (AccessSchedule.training(5), up + down + down),
        ):
            w.predict(predicted)
            for unit, phase in accesses:
                assert w.use(unit, phase)


def test_what_is_expected_already_is_left_in_peace() -> None:
    w = world(2, 4, EMPTY, 2)
    w.predict(AccessSchedule.training(4))
    assert not w.cache.predict(AccessSchedule.training(4))
    assert not any(load.cancelled for load in w.fills)
    w.use(0)
    assert w.cache.predict(AccessSchedule.training(4)), "in the middle of a cycle it says to begin again"


def test_another_prediction_cancels_loads_nobody_will_use() -> None:
    w = world(2, 6, EMPTY, 2)
    w.predict(schedule("F0 F1 F2"))
    w.predict(schedule("F4 F1"))
    assert [(load.unit, load.cancelled) for load in w.fills] == [(0, True), (1, False)]
    w.use(4)
    w.use(1)
    assert loaded(w) == [0, 1, 4], "the load of unit 1 served the new prediction"


def test_a_load_that_the_next_access_will_plan_is_kept() -> None:
    w = world(2, 4, EMPTY, 1)
    w.predict(schedule("F0 F1"))
    w.use(0)
    w.predict(schedule("F2 F1"))
    assert [(load.unit, load.cancelled) for load in w.fills] == [(0, False), (1, False), (2, False)]


def test_an_unpredicted_access_goes_on_from_its_next_place_in_the_cycle() -> None:
    w = world(4, 8, EMPTY, 1)
    w.predict(schedule("F0 F1 F2 F1 F3"))
    for unit in (0, 1, 1):
        w.use(unit)
    assert loaded(w) == [0, 1, 2, 3], "the second F1 was meant, so F3 is next and not F2"


def test_a_ring_of_no_units_can_be_predicted_aborted_and_closed() -> None:
    cache = SlotCache({}, EMPTY, 2, lambda load: None)
    cache.predict(EMPTY)
    cache.abort()
    cache.close()


def test_a_prefetch_starts_one_load_whatever_the_depth_and_does_not_wait() -> None:
    w = world(1, 1, schedule("F0"), 0)
    for _ in range(2):
        w.prefetch(0, F)
    assert loaded(w) == [0]
    assert w.use(0) and loaded(w) == [0]
    w.cache.close()
    with pytest.raises(StreamingError, match="closed"):
        w.cache.prefetch(0)


def test_a_prefetch_that_fails_is_told_to_the_access_that_comes_for_it() -> None:
    w = world(1, 1, schedule("F0"), 0)
    w.prefetch(0, F)
    w.end(0, fail=True)
    assert not w.acquire(0)
    assert w.use(0)


def test_forgotten_slots_are_filled_again() -> None:
    w = world(1, 1, schedule("F0"), 0)
    for loads in (1, 2, 3):
        w.acquire(0)
        assert not w.evict(), "in use"
        w.release(0)
        assert w.evict()
        assert len(w.fills) == loads


def test_a_slot_that_is_about_to_be_used_is_not_forgotten() -> None:
    """Its bytes must stay: the access they were read for will not read them again."""
    w = world(1, 1, schedule("F0"), 0)
    w.acquire(0)
    w.prefetch(0, F)
    w.release(0)
    assert not w.evict()
    assert w.use(0) and w.evict()
    w.prefetch(0, F)
    assert not w.evict(), "being filled"
    w.end(0)
    assert not w.evict()


# --- errors ------------------------------------------------------------------------------------------


def test_an_error_comes_to_the_access_that_wanted_the_unit_and_a_retry_works() -> None:
    w = world(2, 4, EMPTY, 2)
    w.predict(AccessSchedule.inference(4))
    w.end(1, fail=True)
    assert w.use(0), "the access before is not disturbed"
    assert not w.acquire(1)
    for unit in (1, 2, 3, 0):
        assert w.use(unit)


def test_every_try_that_fails_raises_its_own_error() -> None:
    w = world(1, 2, AccessSchedule.inference(2), 1, *[("fail", 0)] * 3)
    errors = []
    for _ in range(3):
        with pytest.raises(ReadError) as caught:
            w.cache.acquire(0)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 3
    assert w.cache.acquire(0) == 0


def test_a_failed_prefetch_that_is_never_asked_for_disturbs_nobody() -> None:
    w = world(3, 6, EMPTY, 3)
    w.predict(AccessSchedule.inference(6))
    w.end(1, fail=True)
    for unit in (0, 2, 3, 4, 5, 0):
        assert w.use(unit)
    assert w.use(1), "and what failed then is read when it is asked for"
    assert loaded(w).count(1) == 2


def test_a_failed_prefetch_forgotten_by_a_prediction_or_an_abort_is_not_reported_later() -> None:
    for forget in (lambda w: w.predict(AccessSchedule.training(4)), World.abort):
        w = world(2, 4, EMPTY, 2)
        w.predict(AccessSchedule.inference(4))
        w.end(1, fail=True)
        forget(w)
        assert all(w.use(unit) for unit in (0, 1, 2, 3))


def test_a_unit_wanted_twice_fails_once_and_is_then_counted_right() -> None:
    """A failure takes the place of both uses with it; a later plan of the unit must not stand for them."""
    text = "F0 F1 F1 F0 F0 F1 F0 F0 F3"
    w = world(2, 4, EMPTY, 5)
    w.predict(schedule(text))
    w.end(1, fail=True)
    for _ in range(3):
        for access in schedule(text).accesses:
            while w.under_way:  # so that a later plan of unit 1 has loaded it when its turn comes
                w.end(0)
            assert w.use(access.unit, access.phase) or w.use(access.unit, access.phase)


def test_a_failure_no_access_was_planned_on_is_tried_again_in_silence() -> None:
    """Unit 1 is still being read for an earlier prediction; the new one is blocked before it comes to unit 1."""
    w = world(2, 4, EMPTY, 2)
    w.predict(schedule("F0 F1"))
    w.predict(schedule("F2 F1"))
    w.end(1, fail=True)
    assert w.use(2) and w.use(1)


def test_the_error_of_a_cancelled_load_is_nobodys() -> None:
    w = world(2, 6, EMPTY, 2)
    w.predict(schedule("F0 F1"))
    w.predict(schedule("F2 F1"))
    (cancelled,) = [load for load in w.fills if load.cancelled]
    del w.under_way[cancelled.slot]
    w.cache.finished(cancelled, ReadError("cancelled in the middle"))
    assert w.use(2) and w.use(1)
    assert w.use(0)


def test_a_slot_half_overwritten_by_a_failed_load_does_not_serve_what_was_there() -> None:
    w = world(1, 2, AccessSchedule.inference(2), 0, ("finish", 0), ("fail", 0))
    assert w.use(0)
    assert not w.acquire(1)
    assert w.use(0)
    assert loaded(w) == [0, 1, 0]


# --- interruptions -------------------------------------------------------------------------------------


def test_a_wait_that_is_interrupted_leaves_the_ring_usable() -> None:
    for after in (lambda w: None, World.abort, lambda w: w.predict(AccessSchedule.inference(4))):
        w = world(2, 4, AccessSchedule.training(4), 2, ("interrupt", 0))
        with pytest.raises(KeyboardInterrupt):
            w.cache.acquire(0)
        w.planning = True
        after(w)
        for access in AccessSchedule.training(4).accesses:
            assert w.use(access.unit, access.phase)


def test_an_abort_that_is_interrupted_can_be_followed_by_accesses() -> None:
    w = world(2, 4, EMPTY, 2, ("interrupt", 0))
    w.predict(AccessSchedule.inference(4))
    w.abort()
    for unit in (0, 1, 2, 3):
        assert w.use(unit)


def test_an_interrupt_right_after_a_load_was_handed_over_leaves_the_ring_usable() -> None:
    handed: list[Load] = []

    def fill(load: Load) -> None:
        handed.append(load)
        if len(handed) == 1:
            raise KeyboardInterrupt

    cache = SlotCache({0: 0, 1: 0}, AccessSchedule.inference(2), 0, fill)
    with pytest.raises(KeyboardInterrupt):
        cache.acquire(0, Phase.FORWARD)
    assert handed[0].cancelled
    cache.finished(handed[0])  # by a filler that knows of it all the same
    cache.prefetch(0)
    assert len(handed) == 2
    cache.finished(handed[1])
    assert cache.acquire(0, Phase.FORWARD) == 0


def test_abort_cancels_and_starts_nothing_and_forgets_half_filled_slots() -> None:
    w = world(2, 6, EMPTY, 6)
    w.predict(AccessSchedule.training(6))
    assert loaded(w) == [0, 1]
    w.abort()
    assert all(load.cancelled for load in w.fills)
    assert [slot.state for slot in w.cache.slots] == [SlotState.EMPTY] * 2
    assert loaded(w) == [0, 1]
    assert w.use(0)


def test_abort_keeps_what_is_whole_and_what_is_in_use() -> None:
    w = world(2, 4, AccessSchedule.inference(4), 0)
    assert w.use(0) and w.acquire(1)
    w.abort()
    w.misuse(w.cache.acquire, 3)
    w.release(1)
    assert w.use(0) and w.use(1)
    assert loaded(w) == [0, 1]


def test_a_closed_ring_starts_nothing() -> None:
    w = world(2, 4, EMPTY, 4)
    w.predict(AccessSchedule.inference(4))
    w.close()
    w.cache.predict(AccessSchedule.training(4))
    w.cache.abort()
    with pytest.raises(StreamingError, match="closed"):
        w.cache.acquire(0)


# --- misuse ------------------------------------------------------------------------------------------


def test_misuse_is_refused_at_once_and_changes_nothing() -> None:
    w = world(2, 4, AccessSchedule.inference(4), 2)
    w.misuse(w.cache.release, 0)
    assert w.acquire(0)
    for phase in Phase:
        w.misuse(w.cache.acquire, 0, phase)
        w.misuse(w.cache.acquire, 2, phase)
    w.misuse(w.cache.release, 1)
    w.misuse(w.cache.release, 2)
    w.release(0)
    w.misuse(w.cache.release, 0)
    assert w.use(1) and w.use(2)


def test_the_refusal_names_both_units() -> None:
    w = world(2, 4, AccessSchedule.inference(4), 2)
    w.acquire(0)
    with pytest.raises(StreamingError, match=r"unit 2 .* unit 0 is in use"):
        w.cache.acquire(2)


# --- real threads ----------------------------------------------------------------------------------------


class Disk:
    """Threads that fill slots late, out of order, in two halves, and look whether anybody is in there."""

    def __init__(self, slots: int, seed: int, failures: float = 0.0, threads: int = 3) -> None:
        self.random = random.Random(seed)
        self.failures = failures
        self.slots = [[-1, -1] for _ in range(slots)]
        self.used = [False] * slots
        self.broken: list[str] = []
        self.failed: dict[int, list[ReadError]] = {}
        self.loads: SimpleQueue[Load | None] = SimpleQueue()
        self.cache: SlotCache
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def run(self) -> None:
        while (load := self.loads.get()) is not None:
            error = None
            for half in (0, 1):
                if self.used[load.slot]:
                    self.broken.append(f"slot {load.slot} was overwritten while in use")
                self.slots[load.slot][half] = -1
                if self.random.random() < 0.5:
                    time.sleep(self.random.random() * 4e-4)
                if load.cancelled:
                    break
                if self.random.random() < self.failures / 2:
                    error = ReadError(f"unit {load.unit}")
                    self.failed.setdefault(load.unit, []).append(error)
                    break
                self.slots[load.slot][half] = load.unit
            self.cache.finished(load, error)

    def use(self, unit: int, phase: Phase) -> int:
        """Access a unit, again after every error; what its slot held."""
        while True:
            try:
                slot = self.cache.acquire(unit, phase)
            except ReadError as error:
                if error not in self.failed.get(unit, ()):
                    self.broken.append("an error came to an access that did not want the unit")
                continue
            self.used[slot] = True
            before = list(self.slots[slot])
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 2e-4)
            after = list(self.slots[slot])
            self.used[slot] = False
            self.cache.release(unit)
            if before != [unit, unit] or after != [unit, unit]:
                self.broken.append(f"unit {unit} found {before}, then {after}")
            return after[0]

    def stop(self) -> None:
        for _ in self.threads:
            self.loads.put(None)
        for thread in self.threads:
            thread.join(10)


def guarded(work: Callable[[], None], seconds: float = 20) -> None:
    """Run work in a thread and call it a deadlock if it has not ended in time."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]


@pytest.fixture
def no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_POLL_SECONDS", 3600)


@pytest.mark.usefixtures("no_poll")
def test_every_depth_and_every_number_of_slots_gives_the_same_contents() -> None:
    predicted = AccessSchedule.training(6, 1)
    wanted = [access.unit for access in predicted.accesses] * 2
    for slots in range(1, 5):
        for depth in range(7):
            disk = Disk(slots, seed=slots * 10 + depth)
            disk.cache = SlotCache({unit: unit % slots for unit in range(6)}, predicted, depth, disk.loads.put)
            found: list[int] = []
            guarded(lambda d=disk, f=found: f.extend(d.use(v.unit, v.phase) for v in predicted.accesses * 2))
            disk.cache.close()
            disk.stop()
            assert not disk.broken
            assert found == wanted


@pytest.mark.usefixtures("no_poll")
@settings(max_examples=40, deadline=None)
@example(seed=1, slots=2, units=6, depth=2, failures=0.0)
@given(
    seed=st.integers(0, 2**16), slots=st.integers(1, 4), units=st.integers(1, 8), depth=st.integers(0, 6),
    failures=st.sampled_from([0.0, 0.2]),
)  # fmt: skip
def test_threads_errors_and_predictions_at_odd_moments(
    seed: int, slots: int, units: int, depth: int, failures: float
) -> None:
    draw = random.Random(seed)
    plans = [AccessSchedule.training(units, draw.randint(0, units)), AccessSchedule.inference(units), EMPTY]
    disk = Disk(slots, seed, failures)
    cache = disk.cache = SlotCache({unit: unit % slots for unit in range(units)}, plans[0], depth, disk.loads.put)
    over = threading.Event()

    def disturb() -> None:
        other = random.Random(seed + 1)
        while not over.wait(other.random() * 1e-3):
            if other.random() < 0.2:
                cache.abort()
            else:
                cache.predict(other.choice(plans))

    def access() -> None:
        for _ in range(3):
            for planned in draw.choice(plans).accesses:
                disk.use(planned.unit, planned.phase)
                if draw.random() < 0.1:
                    disk.use(draw.randrange(units), draw.choice(list(Phase)))

    disturber = threading.Thread(target=disturb, daemon=True)
    if draw.random() < 0.7:
        disturber.start()
    try:
        guarded(access)
    finally:
        over.set()
        if disturber.ident:
            disturber.join(10)
        guarded(cache.abort)
        cache.close()
        disk.stop()
    assert not disk.broken


@pytest.mark.usefixtures("no_poll")
def test_close_wakes_who_waits() -> None:
    cache = SlotCache({0: 0, 1: 1}, AccessSchedule.inference(2), 1, lambda load: None)
    waits = threading.Event()
    cache.on_overwrite = lambda load: waits.set()

    def ask() -> None:
        with pytest.raises(StreamingError, match="closed"):
            cache.acquire(0)

    thread = threading.Thread(target=guarded, args=(ask,), daemon=True)
    thread.start()
    assert waits.wait(10)
    guarded(cache.close)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.usefixtures("no_poll")
def test_abort_lets_who_waits_ask_anew() -> None:
    loads: SimpleQueue[Load] = SimpleQueue()
    cache = SlotCache({0: 0, 1: 1}, AccessSchedule.inference(2), 1, loads.put)
    asking = threading.Thread(target=cache.acquire, args=(1,), daemon=True)
    asking.start()
    first = loads.get(timeout=10)
    aborting = threading.Thread(target=cache.abort, daemon=True)
    aborting.start()
    while not first.cancelled:
        time.sleep(0.001)
    cache.finished(first)
    aborting.join(10)
    assert not aborting.is_alive()
    cache.finished(loads.get(timeout=10))
    asking.join(10)
    assert not asking.is_alive()
    cache.release(1)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
def test_a_signal_reaches_an_access_that_waits() -> None:
    """A real Ctrl-C comes as a signal to the main thread, here under another number."""
    loads: list[Load] = []
    cache = SlotCache({0: 0, 1: 1}, AccessSchedule.inference(2), 1, loads.append)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            cache.acquire(0)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)
    cache.finished(loads.pop())
    assert cache.acquire(0) == 0
    cache.release(0)
