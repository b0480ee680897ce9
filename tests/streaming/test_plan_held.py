"""A plan is held against the model and the device it is given for, before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_tiny
from helpers import strategy_plan
from lema.errors import PlanError
from lema.models import get_adapter
from lema.models.transformers_adapter import TransformersAdapter
from lema.planning.plan import MemoryPlan
from lema.storage.index import GlobalBinaryIndex
from lema.streaming.weight_store import WeightStore
from simulated import SimulatedDevice

LAYERS = 3


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GlobalBinaryIndex, TransformersAdapter]]:
    folder: Path = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder, num_hidden_layers=LAYERS)
    adapter = get_adapter("llama", json.loads((folder / "config.json").read_text()))
    assert isinstance(adapter, TransformersAdapter)
    adapter.configure(torch.float32, "eager")
    with GlobalBinaryIndex(folder) as gbi:
        yield gbi, adapter


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"from_disk": (0, 1)}, "unit 2 is in none of on_device, in_ram, from_disk, mapped"),
        ({"in_ram": (1,)}, "unit 1 is in in_ram and in from_disk"),
        ({"mapped": (0, 2)}, "unit 0 is in from_disk and in mapped"),
        ({"from_disk": (0, 1, 1, 2)}, "unit 1 is in from_disk and in from_disk"),
        ({"from_disk": (0, 1, 2, 3)}, "from_disk has unit 3, and the model has units 0..2"),
        ({"keep_activations": (-1,)}, "keep_activations has unit -1, and the model has units 0..2"),
        ({"from_disk": (0, 1), "on_device": (2,)}, "on_device has unit 2, and there is no device beside the CPU"),
        ({"device": "cuda"}, "device='cuda', and layers are computed on the CPU"),
        ({"host_slots": 1}, "host_slots=1 must be 2 or more"),
        ({"device_slots": 0}, "device_slots=0 must be 2 or more"),
        ({"head": "chunked"}, "head_rows=0 must be 1 or more where the head is chunked"),
        ({"head": "gone"}, "head='gone' must be one of resident, streamed, chunked, mapped"),
        ({"boundaries": "disk"}, "boundaries='disk' must be one of device, host"),
        ({"optimizer": "disk"}, "optimizer='disk' must be one of device, host"),
    ],
    ids=str,
)
def test_a_plan_for_something_else_is_refused(parts: Any, changes: dict[str, Any], words: str) -> None:
    plan = replace(strategy_plan(*parts), **changes)
    with pytest.raises(PlanError) as caught:
        WeightStore(*parts, plan, "cpu")
    assert str(caught.value).startswith(words)


def test_a_plan_of_the_cpu_is_refused_beside_a_device(parts: Any) -> None:
    device = SimulatedDevice(seed=1)
    with pytest.raises(PlanError, match="device='cpu', and layers are computed beside it"):
        WeightStore(*parts, strategy_plan(*parts), "cpu", backend=device)
    device.close()


@pytest.mark.parametrize("strategy", ["streaming", "resident"])
def test_a_plan_for_this_model_is_taken(parts: Any, strategy: str) -> None:
    plan: MemoryPlan = strategy_plan(*parts, strategy=strategy)
    assert sorted((*plan.on_device, *plan.in_ram, *plan.from_disk, *plan.mapped)) == list(range(LAYERS))
    WeightStore(*parts, plan, "cpu").close()
