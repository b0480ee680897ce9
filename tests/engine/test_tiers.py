"""The whole engine over three tiers, on the simulated device: every way to spread a model gives the same numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import lema
from families import save_tiny
from helpers import Recorder, differing, lema_config, plain_model, plain_step, randomise, recorded, relative
from lema.models import get_adapter
from lema.models.lora import LoRAManager
from lema.planning.plan import MemoryPlan
from lema.storage.index import GlobalBinaryIndex
from lema.streaming.weight_store import WeightStore
from simulated import SimulatedDevice

pytestmark = pytest.mark.timeout(180)

LAYERS = 6
PLAIN = MemoryPlan(
    device="cuda", on_device=(), in_ram=(), from_disk=tuple(range(LAYERS)), keep_activations=(), host_slots=2,
    device_slots=2, batch=3, seq=10, micro_batch_size=3, loss_chunk_size=None, head="resident", head_rows=99,
    boundaries="device", optimizer="device",
)  # fmt: skip


def spread(on_device: tuple[int, ...] = (), in_ram: tuple[int, ...] = (), **changes: Any) -> MemoryPlan:
    left = tuple(unit for unit in range(LAYERS) if unit not in {*on_device, *in_ram})
    return replace(PLAIN, on_device=on_device, in_ram=in_ram, from_disk=left, **changes)


PLANS = {
    "all from disk": spread(),
    "all in RAM": spread(in_ram=tuple(range(LAYERS))),
    "all on the device": spread(on_device=tuple(range(LAYERS)), keep_activations=tuple(range(LAYERS))),
    "all three tiers": spread(on_device=(1, 5), in_ram=(0, 3)),
    "every second on the device": spread(on_device=(1, 3, 5)),
    "boundaries on the host": spread(on_device=(5,), boundaries="host"),
    "boundaries on the host, graphs kept": spread(on_device=(2, 5), boundaries="host", keep_activations=(2, 4, 5)),
    "optimizer on the host": spread(in_ram=(2,), optimizer="host"),
    "everything": spread(
        on_device=(3,), in_ram=(0, 5), boundaries="host", optimizer="host", keep_activations=(3, 5), device_slots=3,
        host_slots=3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    return folder


class Engine:
    """The low-level parts put together over a simulated device."""

    def __init__(self, folder: Path, plan: MemoryPlan, device: SimulatedDevice | None = None, **settings: Any) -> None:
        import json

        self.device = device or SimulatedDevice(seed=len(plan.in_ram), longest_pause=0.001)
        adapter = get_adapter("llama", json.loads((folder / "config.json").read_text()))
        adapter.configure(torch.float32, "eager")
        self.memory = WeightStore(GlobalBinaryIndex(folder), adapter, plan, "cpu", backend=self.device, poison=True)
        self.lora = LoRAManager(
            {"r": 4, "alpha": 8, "target_modules": "all-linear", "dropout": settings.pop("dropout", 0.0)},
            device="cpu", seed=7,
        )  # fmt: skip
        self.lora.attach(adapter)
        self.trainer = lema.LemaTrainer(
            lema_config(folder, **settings), adapter, self.memory.gbi, self.lora,
            Recorder(self.lora.get_trainable_parameters()), self.memory,
        )  # fmt: skip

    def close(self) -> None:
        self.memory.close()
        self.device.close()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (3, 10), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "labels": ids}


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
