"""The predicted order of accesses, and how many loads it costs: counted on paper and by a real cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from families import save_tiny
from helpers import strategy_plan
from lema.errors import ConfigError
from lema.models.llama import LlamaAdapter
from lema.storage.index import GlobalBinaryIndex
from lema.streaming.schedule import Access, AccessSchedule, Phase
from lema.streaming.slot_cache import Load, SlotCache
from lema.streaming.weight_store import WeightStore

pytestmark = pytest.mark.timeout(60)


def schedule(text: str) -> AccessSchedule:
    """`F0 F1 B1 B0` as a schedule."""
    phases = {"F": Phase.FORWARD, "B": Phase.BACKWARD}
    return AccessSchedule(tuple(Access(int(word[1:]), phases[word[0]]) for word in text.split()))


def by_rank(units: list[int], num_slots: int) -> dict[int, int]:
    return {unit: rank % num_slots for rank, unit in enumerate(units)}


@contextmanager
def cache_with_filler(
    slot_of: dict[int, int], predicted: AccessSchedule, depth: int
) -> Iterator[tuple[SlotCache, list[Load]]]:
    """A cache whose loads end at once, in another thread, and the loads in the order they were started."""
    started: list[Load] = []
    with ThreadPoolExecutor(1) as pool:

        def fill(load: Load) -> None:
            started.append(load)
            pool.submit(cache.finished, load)

        cache = SlotCache(slot_of, predicted, depth, fill)
        yield cache, started


def drive(cache: SlotCache, accesses: tuple[Access, ...]) -> None:
    for access in accesses:
        assert cache.acquire(access.unit, access.phase) == cache.slot_of[access.unit]
        cache.release(access.unit)


# --- the order ------------------------------------------------------------------------------------


def test_inference_goes_up() -> None:
    assert AccessSchedule.inference(4) == schedule("F0 F1 F2 F3")
    assert AccessSchedule.inference(0) == AccessSchedule(())


def test_training_goes_up_and_down() -> None:
    assert AccessSchedule.training(3) == schedule("F0 F1 F2 B2 B1 B0")
    assert AccessSchedule.training(1) == schedule("F0 B0")
    assert AccessSchedule.training(0) == AccessSchedule(())


def test_the_backward_stops_at_the_lowest_unit_a_gradient_has_to_reach() -> None:
    """LoRA on layers 3 and 4 only, of 5: units 4 and 3 are accessed again, no other."""
    assert AccessSchedule.training(5, lowest=3) == schedule("F0 F1 F2 F3 F4 B4 B3")
    assert AccessSchedule.training(5, lowest=4) == schedule("F0 F1 F2 F3 F4 B4")
    assert AccessSchedule.training(5, lowest=5) == AccessSchedule.inference(5)


@pytest.mark.parametrize("lowest", [-1, 4, 99])
def test_a_lowest_unit_that_does_not_exist_is_refused(lowest: int) -> None:
    with pytest.raises(ConfigError, match=str(lowest)):
        AccessSchedule.training(3, lowest)


def test_only_keeps_the_order_of_the_units_named() -> None:
    assert AccessSchedule.training(4).only(frozenset({0, 2})) == schedule("F0 F2 B2 B0")
    assert AccessSchedule.training(4).only(frozenset()) == AccessSchedule(())


def test_position_goes_round_from_its_start() -> None:
    cycle = schedule("F0 F1 B1 F0 F1")
    assert cycle.position(Access(0, Phase.FORWARD)) == 0
    assert cycle.position(Access(0, Phase.FORWARD), 1) == 3
    assert cycle.position(Access(0, Phase.FORWARD), 4) == 0
    assert cycle.position(Access(1, Phase.FORWARD), 1) == 1
    assert cycle.position(Access(0, Phase.BACKWARD)) is None
    assert AccessSchedule(()).position(Access(0, Phase.FORWARD)) is None


def test_the_schedule_is_a_function_of_counts_alone() -> None:
    """Every process that is given the same counts must predict the same order, so equal ones must compare equal."""
    assert AccessSchedule.training(7, 2) == AccessSchedule.training(7, 2)
    assert hash(AccessSchedule.training(7, 2)) == hash(AccessSchedule.training(7, 2))
    assert AccessSchedule.training(7, 2) != AccessSchedule.training(7, 3)


# --- the loads ------------------------------------------------------------------------------------

SIZES = [(n, s) for s in range(2, 6) for n in range(s, 10)]


@pytest.mark.parametrize(("num_units", "num_slots"), SIZES)
def test_a_step_loads_what_the_slots_cannot_keep_over_its_turns(num_units: int, num_slots: int) -> None:
    loads = AccessSchedule.training(num_units).loads(by_rank(list(range(num_units)), num_slots))
    assert len(loads.accesses) == 2 * (num_units - num_slots)
    up = [v.unit for v in loads.accesses if v.phase is Phase.FORWARD]
    down = [v.unit for v in loads.accesses if v.phase is Phase.BACKWARD]
    assert up == list(range(num_slots, num_units)), "the first units are still there from the backward before"
    assert down == list(range(num_units - num_slots - 1, -1, -1)), "the last units are still there from the forward"


@pytest.mark.parametrize("depth", [0, 1, 3, 20])
@pytest.mark.parametrize(("num_units", "num_slots"), [(3, 2), (8, 2), (5, 4), (8, 3), (9, 5)])
def test_a_ring_loads_as_often_as_the_schedule_says(num_units: int, num_slots: int, depth: int) -> None:
    slot_of, predicted = by_rank(list(range(num_units)), num_slots), AccessSchedule.training(num_units)
    with cache_with_filler(slot_of, predicted, depth) as (cache, started):
        counts = []
        for _ in range(4):
            assert not cache.predict(predicted), "what is expected already must not disturb what is read ahead"
            drive(cache, predicted.accesses)
            counts.append(cache.loads)
        steady = {after - before for before, after in pairwise(counts[1:])}
        assert steady == {2 * (num_units - num_slots)}
        assert cache.loads == len(started)
        order = [Access(load.unit, load.phase) for load in started]
    cycle = predicted.loads(slot_of).accesses
    first = [Access(unit, Phase.FORWARD) for unit in range(num_slots)]
    assert order == (first + list(cycle) * 5)[: len(order)], "a cache before this one is asked in this order"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cycle_is_loaded_in_the_order_loads_says(data: st.DataObject) -> None:
    num_units = data.draw(st.integers(1, 6))
    slot_of = by_rank(list(range(num_units)), data.draw(st.integers(1, 4)))
    unit = st.builds(Access, st.integers(0, num_units - 1), st.sampled_from(Phase))
    predicted = AccessSchedule(tuple(data.draw(st.lists(unit, min_size=1, max_size=12))))
    with cache_with_filler(slot_of, predicted, data.draw(st.integers(0, 8))) as (cache, started):
        for _ in range(3):
            drive(cache, predicted.accesses)
    cycle = predicted.loads(slot_of).accesses
    loaded = [Access(load.unit, load.phase) for load in started]
    first: list[Access] = []
    held: dict[int, int] = {}
    for access in predicted.accesses:
        if held.get(slot_of[access.unit]) != access.unit:
            held[slot_of[access.unit]] = access.unit
            first.append(access)
    assert loaded == (first + list(cycle) * 4)[: len(loaded)]
    assert len(loaded) >= len(first) + 2 * len(cycle)


# --- the slots ------------------------------------------------------------------------------------

EVERY_SECOND = [0, 2, 4, 6]
"""The streamed units where every second one is resident."""


def test_rank_modulo_slots_can_prefetch_where_index_modulo_slots_collides() -> None:
    predicted = AccessSchedule.training(8).only(frozenset(EVERY_SECOND))
    for slot_of, ahead in ((by_rank(EVERY_SECOND, 2), [0, 2]), ({unit: unit % 2 for unit in EVERY_SECOND}, [0])):
        started: list[Load] = []
        cache = SlotCache(slot_of, AccessSchedule(()), 2, started.append)
        cache.predict(predicted)
        assert [load.unit for load in started] == ahead


@pytest.fixture(scope="module")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder, num_hidden_layers=8)
    return folder


def test_the_manager_gives_slots_by_rank_among_the_streamed_units(eight_layers: Path) -> None:
    adapter = LlamaAdapter(AutoConfig.from_pretrained(eight_layers).to_dict())
    odd = [1, 3, 5, 7]
    predicted = AccessSchedule.training(8)
    with (
        GlobalBinaryIndex(eight_layers) as gbi,
        WeightStore(gbi, adapter, strategy_plan(gbi, adapter, odd), "cpu", poison=True) as memory,
    ):
        sources = adapter.unit_sources(gbi)
        assert memory.streamed == EVERY_SECOND
        memory.predict(predicted)
        memory.acquire(0)
        assert memory.stats.loads == 2, "unit 2 is read while unit 0 is in use"
        memory.release(0)
        memory.predict(predicted)
        loads = [memory.stats.loads]
        for _ in range(4):
            for access in predicted.accesses:
                with memory.use(access.unit, access.phase):
                    for source, bound in zip(sources[access.unit], adapter.bound_tensors(access.unit), strict=True):
                        assert torch.equal(bound, gbi.view(source.name))
            loads.append(memory.stats.loads)
        assert {after - before for before, after in pairwise(loads[2:])} == {2 * (4 - 2)}
