"""Out of device memory: what is said, and that the next step is as if nothing had happened."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from families import save_tiny
from helpers import lema_config, lema_model, padded_batch
from lema import LemaModel, LemaTrainer
from lema.engine.device_memory import explained
from lema.engine.loss.head_loss import HeadLoss
from lema.engine.loss.positions import LossResult
from lema.errors import DeviceError, DeviceMemoryError
from lema.planning.plan import MemoryPlan
from training_runs import make_model, settings_of, train, write_rows
from virtual_device.controls import Controls

pytestmark = pytest.mark.timeout(120)

GB = 10**9
PLAN = MemoryPlan(
    device="xpu", on_device=(0, 1), in_ram=(2,), from_disk=(3,), keep_activations=(), host_slots=2, device_slots=2,
    batch=8, seq=512, micro_batch_size=4, loss_chunk_size=None, head="resident", head_rows=99, boundaries="device",
    optimizer="device", loss_bytes=GB,
    device_bytes={
        "overhead": GB // 10, "slots": GB, "layers kept on the device": GB, "rest of the model": GB, "adapters": GB,
        "boundaries": GB, "activations": GB,
    },
)  # fmt: skip


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 24 GB: torch holds 9 of them, others 4."""
    module = SimpleNamespace(
        mem_get_info=lambda _: (11 * GB, 24 * GB), memory_reserved=lambda _: 9 * GB, memory_allocated=lambda _: 8 * GB
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for name in ("get_memory_info", "memory_reserved", "memory_allocated"):
        monkeypatch.delattr(torch.accelerator, name, raising=False)


def said(plan: MemoryPlan) -> str:
    with pytest.raises(DeviceMemoryError) as caught, explained("xpu", plan):
        raise torch.OutOfMemoryError("XPU out of memory. Tried to allocate 3 GiB.\nmore of it")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    return str(caught.value)


def test_the_plan_stands_beside_what_is_taken(card: None) -> None:
    message = said(PLAN)
    for part in (
        "xpu is out of memory: XPU out of memory. Tried to allocate 3 GiB. Planned were 6.1 GB", "overhead 100 MB",
        "in use are 8 GB, reserved 9 GB, 4 GB are taken by others, free 11 GB of 24 GB", "vram_budget below 6.1 GB",
    ):  # fmt: skip
        assert part in message
    assert "Set vram_budget ('auto'" in said(dataclasses.replace(PLAN, device_bytes={}))


@pytest.mark.parametrize(
    ("largest", "changes", "setting"),
    [
        ("activations", {"loss_bytes": 3 * GB // 2}, "set loss_chunk_size below 4096, or"),
        ("activations", {"loss_bytes": 3 * GB // 2, "loss_chunk_size": 256}, "set loss_chunk_size below 256, or"),
        ("activations", {"loss_bytes": 0}, "set micro_batch_size below 4, or"),
        ("activations", {"loss_bytes": 0, "micro_batch_size": 1}, "set max_seq_length below 512, or"),
        (
            "activations", {"loss_bytes": 0, "micro_batch_size": 1, "keep_activations": (1, 2)},
            "set keep_activations below 2, or",
        ),
        ("boundaries", {}, "set boundaries to 'host', or"),
        ("boundaries", {"boundaries": "host"}, "set max_seq_length below 512, or"),
        ("adapters", {}, "set optimizer_place to 'host', or"),
        ("adapters", {"optimizer": "host"}, "set lora_rank lower, or"),
        ("rest of the model", {}, "set head to 'chunked', or"),
        ("rest of the model", {"head": "chunked"}, ": set vram_budget below"),
        ("slots", {}, ": set vram_budget below"),
        ("slots", {"device_slots": 4}, "set vram_buffer_size below 4, or"),
        ("layers kept on the device", {}, "set device_layers below 2, or"),
    ],
)  # fmt: skip
def test_the_setting_is_that_of_the_largest_part(
    card: None, largest: str, changes: dict[str, Any], setting: str
) -> None:
    plan = dataclasses.replace(PLAN, device_bytes={**PLAN.device_bytes, largest: 2 * GB}, **changes)
    message = said(plan)
    assert f"The largest part is {largest}: " in message
    assert setting in message


def test_a_device_that_does_not_count_leaves_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(device: str) -> None:
        raise DeviceError("it does not count")

    monkeypatch.setattr("lema.engine.device_memory.device_memory", refuses)
    assert "Planned were 6.1 GB" in said(PLAN)


# -- the state afterwards ----------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[LemaTrainer]:
    save_tiny("llama", tmp_path / "model")
    with lema_model(tmp_path / "model") as model:
        yield model.get_trainer()


def parameters_of(trainer: LemaTrainer) -> list[torch.Tensor]:
    return [p.detach().cpu().clone() for p in trainer.lora_manager.get_trainable_parameters()]  # type: ignore[union-attr]


def fails_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """The next call of a method finds no room."""
    original = getattr(owner, name)

    def refused(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 3 GiB.")

    monkeypatch.setattr(owner, name, refused)


@pytest.mark.parametrize("place", ["hidden_states", "loss", "backward"])
def test_a_step_without_room_leaves_no_trace(trainer: LemaTrainer, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    batch = padded_batch()
    before = parameters_of(trainer)
    owner, name = {
        "hidden_states": (trainer.lm, "hidden_states"), "loss": (HeadLoss, "__call__"),
        "backward": (LossResult, "backward"),
    }[place]  # fmt: skip
    fails_once(monkeypatch, owner, name)
    with pytest.raises(DeviceMemoryError, match="Nothing was planned"):
        trainer.train_step(batch)
    parameters = trainer.lora_manager.get_trainable_parameters()  # type: ignore[union-attr]
    assert all(p.grad is None for p in parameters)
    assert all(a.equal(b) for a, b in zip(before, parameters_of(trainer), strict=True))
    _, loss = trainer.train_step(batch)
    assert loss is not None
    assert trainer.global_step == 1
    assert not all(a.equal(b) for a, b in zip(before, parameters_of(trainer), strict=True))


def test_what_the_failed_work_held_is_let_go() -> None:
    freed: list[bool] = []

    class Held:
        def __del__(self) -> None:
            freed.append(True)

    def work() -> None:
        held = Held()  # noqa: F841
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(DeviceMemoryError) as caught, explained("cpu", PLAN):
        work()
    gc.collect()
    assert caught.value is not None
    assert freed == [True]


def test_the_loop_saves_the_last_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for any other error: what is on disk afterwards is the step before the one without room."""
    original, calls = HeadLoss.__call__, []

    def refused(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(HeadLoss, "__call__", refused)
    model, rows = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DeviceMemoryError):
        train(settings_of(model, rows, tmp_path / "out", eval_size=0, save_steps=100))
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


# -- on a device -------------------------------------------------------------------------------------


@pytest.mark.accelerator
def test_a_device_without_room(virtual: Controls, tmp_path: Path) -> None:
    """Too little for the slots, then enough for a small step and too little for a large one."""
    save_tiny("llama", tmp_path / "model")
    name = virtual.device.type
    config = lema_config(tmp_path / "model", device=name)
    torch.get_device_module(name).empty_cache()
    taken = torch.accelerator.memory_reserved()
    with virtual.capacity(taken), pytest.raises(DeviceMemoryError, match=f"{name} is out of memory.*reserved"):
        LemaModel(config).get_trainer()
    with LemaModel(config) as model:
        trainer = model.get_trainer()
        small, large = padded_batch(rows=2), padded_batch(rows=64, length=60)
        trainer.train_step(small)
        before = parameters_of(trainer)
        with virtual.capacity(torch.accelerator.memory_reserved() + (1 << 20)):
            with pytest.raises(DeviceMemoryError, match="out of memory"):
                trainer.train_step(large)
            assert all(a.equal(b) for a, b in zip(before, parameters_of(trainer), strict=True))
            trainer.train_step(small)
        assert trainer.global_step == 2
        trainer.train_step(large)
