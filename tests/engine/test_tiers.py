"""The whole engine over three tiers, on the simulated device: every way to spread a model gives the same numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_tiny
from helpers import differing, plain_model, plain_step, randomise, recorded, relative
from lema.planning.plan import MemoryPlan
from simulated import SimulatedDevice
from spreads import LAYERS, PLANS, Engine, batch

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    return folder


def numbers(llama: Path, plan: MemoryPlan, steps: int = 3, **settings: Any) -> list[Any]:
    """Losses and gradients of some steps that change nothing, beside those of plain PEFT."""
    plain = plain_model(llama, dropout=settings.get("dropout", 0.0))
    engine = Engine(llama, plan, **settings)
    randomise(plain, engine.trainer.model)
    if engine.trainer.trainables.masters is not None:
        engine.trainer.trainables.masters.copy_from_model()
    results = []
    for step in range(steps):
        torch.manual_seed(step)
        expected_loss, expected = plain_step(plain, batch())
        torch.manual_seed(step)
        _, loss = engine.trainer.train_step(batch())
        assert loss is not None
        results.append((expected_loss, expected, loss, recorded(engine.trainer, engine.trainer.model)))
    engine.trainer.eval_step(batch())
    engine.close()
    return results


@pytest.mark.parametrize("name", PLANS)
def test_every_spread_gives_the_bits_of_plain_peft(llama: Path, name: str) -> None:
    for expected_loss, expected, loss, found in numbers(llama, PLANS[name]):
        assert relative(loss, expected_loss) <= 1e-6
        assert not differing(expected, found)


@pytest.mark.parametrize("name", ["everything", "all three tiers"])
def test_dropout_is_replayed_over_tiers(llama: Path, name: str) -> None:
    for expected_loss, expected, loss, found in numbers(llama, PLANS[name], dropout=0.3):
        assert relative(loss, expected_loss) <= 1e-6
        assert not differing(expected, found)


@pytest.mark.parametrize("name", ["all from disk", "all three tiers", "everything"])
def test_a_chunked_head_comes_over_the_tiers_too(llama: Path, name: str) -> None:
    plan = replace(PLANS[name], head="chunked", head_rows=40, loss_chunk_size=7)
    for expected_loss, expected, loss, found in numbers(llama, plan):
        assert relative(loss, expected_loss) <= 1e-6
        far = [n for n, g in expected.items() if not torch.allclose(found[n], g, rtol=1e-4, atol=1e-7)]
        assert not far


@pytest.mark.parametrize("name", ["all in RAM", "all on the device", "all three tiers", "every second on the device"])
def test_what_stays_is_read_once_and_the_rest_passes_as_often_as_slots_demand(llama: Path, name: str) -> None:
    plan = PLANS[name]
    engine = Engine(llama, plan)
    seen = []
    for _ in range(4):
        engine.trainer.train_step(batch())
        stats = engine.memory.stats
        seen.append((stats.loads, stats.bytes_read))
    loads = [b[0] - a[0] for a, b in pairwise(seen[1:])]
    read = [b[1] - a[1] for a, b in pairwise(seen[1:])]
    passing = LAYERS - len(plan.on_device)
    assert set(loads) == {2 * max(passing - plan.device_slots, 0)}
    unit = engine.memory._layers[0].layout.read_bytes
    assert max(read) <= 2 * len(plan.from_disk) * unit
    if not plan.from_disk:
        assert set(read) == {0}
    engine.close()


def test_host_memory_is_pinned_once_and_given_back(llama: Path) -> None:
    engine = Engine(llama, PLANS["everything"])
    pinned = []
    for _ in range(3):
        engine.trainer.train_step(batch())
        pinned.append(engine.device.pins)
    assert len(set(pinned)) == 1
    engine.close()
    assert engine.device.pinned_bytes == 0


def test_a_device_whose_pinning_is_refused_gives_the_same_numbers(llama: Path) -> None:
    plain = plain_model(llama)
    device = SimulatedDevice(seed=5, longest_pause=0.001, pinning_refused=True)
    engine = Engine(llama, PLANS["everything"], device)
    randomise(plain, engine.trainer.model)
    assert engine.trainer.trainables.masters is not None
    engine.trainer.trainables.masters.copy_from_model()
    _, expected = plain_step(plain, batch())
    engine.trainer.train_step(batch())
    assert not differing(expected, recorded(engine.trainer, engine.trainer.model))
    engine.close()
