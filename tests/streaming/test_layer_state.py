"""Layers of codes with scales, over every chain of tiers: values where they are computed, and nothing stale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from helpers import strategy_plan
from int4 import sources_of, write
from lema.errors import BindingError, StreamingError
from lema.storage.index import GlobalBinaryIndex
from lema.storage.layout import ParameterSource
from lema.streaming.layer_state import Residency
from lema.streaming.schedule import AccessSchedule
from lema.streaming.weight_store import WeightStore
from simulated import SimulatedDevice

pytestmark = pytest.mark.timeout(120)

LAYERS, SHAPE = 5, (24, 16)


class Coded:
    """A model of nothing but weights: int4 codes with scales, and a norm, a layer."""

    packs_units = False

    def __init__(self) -> None:
        self.parameters: dict[int, list[torch.Tensor]] = {}

    def unit_sources(self, gbi: GlobalBinaryIndex) -> list[list[ParameterSource]]:
        return [sources_of(gbi, unit, SHAPE, torch.float32) for unit in range(LAYERS)]

    def rest_sources(self, gbi: GlobalBinaryIndex) -> list[ParameterSource]:
        return []

    def gathered_by_rows(self) -> frozenset[str]:
        return frozenset()

    def bind_unit(self, unit: int, views: Mapping[str, torch.Tensor], flat: torch.Tensor | None) -> None:
        self.parameters[unit] = [views[f"{unit}.{name}"] for name in ("weight", "norm")]

    def bound_tensors(self, unit: int) -> list[torch.Tensor]:
        return self.parameters[unit]

    def head_source(self, gbi: GlobalBinaryIndex) -> ParameterSource | None:
        return None

    def bind_head(self, view: torch.Tensor) -> None:
        raise AssertionError("there is no head")

    def bind_rest(self, views: Mapping[str, torch.Tensor], device: torch.device) -> None:
        pass


@contextmanager
def coded(folder: Path, with_device: bool) -> Iterator[tuple[WeightStore, Coded, list[torch.Tensor]]]:
    expected = write(folder, [SHAPE] * LAYERS)
    device, model = SimulatedDevice(seed=5) if with_device else None, Coded()
    with (
        GlobalBinaryIndex(folder) as gbi,
        WeightStore(
            gbi,
            model,
            strategy_plan(gbi, model, device="simulated" if with_device else "cpu"),
            "cpu",
            backend=device,
            poison=True,
        ) as memory,
    ):
        yield memory, model, expected
    if device is not None:
        device.close()


@pytest.mark.parametrize("with_device", [False, True])
def test_codes_travel_and_values_are_computed_with(tmp_path: Path, with_device: bool) -> None:
    with coded(tmp_path, with_device) as (memory, model, expected):
        schedule = AccessSchedule.training(LAYERS)
        for _ in range(3):
            memory.predict(schedule)
            for access in schedule.accesses:
                with memory.use(access.unit, access.phase):
                    weight, norm = model.parameters[access.unit]
                    assert torch.equal(weight, expected[access.unit])
                    assert torch.equal(norm, memory.gbi.view(f"{access.unit}.norm"))
        memory.check_bindings()
        assert memory.stats.bytes_read > 0
        assert (memory.stats.bytes_copied > 0) == with_device


def test_a_value_saved_for_a_backward_is_refused_once_the_scratch_holds_another_layer(tmp_path: Path) -> None:
    with coded(tmp_path, with_device=False) as (memory, model, _):
        x = torch.ones(16, requires_grad=True)
        with memory.use(0):
            loss = (model.parameters[0][0] @ x).sum()
        with memory.use(1):
            pass
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_generation_is_read_without_changing_it(tmp_path: Path) -> None:
    with coded(tmp_path, with_device=False) as (memory, _, _):
        with memory.use(0):
            first = memory.generation(0)
            assert memory.generation(0) == first
        with memory.use(0):
            assert memory.generation(0) != first, "the scratch was another's to fill in between"


def test_every_unit_is_asked_for_alike_and_others_are_refused(tmp_path: Path) -> None:
    with coded(tmp_path, with_device=False) as (memory, model, _):
        assert [state.residency for state in memory._layers] == [Residency.STREAMED] * LAYERS
        with memory.use(memory.head_unit):
            assert not memory.streams_head
        for unit in (-1, memory.head_unit + 1):
            with pytest.raises(StreamingError, match=rf"unit {unit} .* 0\.\.{LAYERS - 1}"):
                memory.acquire(unit)
        model.parameters[2][0] = model.parameters[2][0].clone()
        with pytest.raises(BindingError, match=r"layer 2 \(shape \(24, 16\)\)"):
            memory.check_bindings()
