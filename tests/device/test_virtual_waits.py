"""Where the host waits for the device in one training step: twice, when the backward has been enqueued."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_tiny
from lema.engine.loss.positions import LossResult
from lema.streaming.accelerator import DeviceEvent
from spreads import LAYERS, PLANS, batch
from virtual_device.controls import Blocking, Controls
from virtual_engine import Engine

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    more = {"n_layer": LAYERS} if request.param == "gpt2" else {"tie_word_embeddings": False}
    save_tiny(request.param, folder, num_hidden_layers=LAYERS, **more)
    return folder


class Waits:
    """What the threads that compute waited for, and how much of it before the backward was enqueued."""

    def __init__(self, calls: list[Blocking]) -> None:
        self.calls = calls
        self.before: int | None = None

    def computing(self) -> list[Blocking]:
        """Not those of the threads that carry weights; they may wait."""
        return [call for call in self.calls if not call.thread.startswith("lema-") and call.kind != "emulation"]


@pytest.fixture
def waits(virtual: Controls, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with virtual.blocking_calls() as calls:
        waits = Waits(calls)
        synchronize, backward = DeviceEvent.synchronize, LossResult.backward

        def synchronized(self: DeviceEvent) -> None:  # it looks and sleeps, so that the device hears of no wait
            calls.append(Blocking("event", "DeviceEvent", 0, threading.current_thread().name, ()))
            synchronize(self)

        def enqueued(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            backward(self, *args, **kwargs)
            waits.before = len(waits.computing())

        monkeypatch.setattr(DeviceEvent, "synchronize", synchronized)
        monkeypatch.setattr(LossResult, "backward", enqueued)
        yield waits


def check(folder: Path, waits: Waits, device: str, plan: Any, **settings: Any) -> None:
    with Engine(folder, plan, device, stepping=True, **settings) as engine:
        for _ in range(3):  # buffers have grown, and it is known that nothing draws
            engine.trainer.train_step(batch())
        waits.calls.clear()
        engine.trainer.train_step(batch())
        found = waits.computing()
    said = "\n".join(map(str, found))
    assert waits.before == 0, f"before the backward was enqueued:\n{said}"
    assert 1 <= len(found) <= 2, said


@pytest.mark.parametrize("name", PLANS)
def test_the_host_waits_twice_a_step(folder: Path, waits: Waits, virtual: Controls, name: str) -> None:
    check(folder, waits, virtual.device.type, PLANS[name])


MORE: dict[str, dict[str, Any]] = {
    "clipping": {"max_grad_norm": 0.5},
    "fp16 and clipping": {"dtype": "float16", "max_grad_norm": 0.5},
    "bf16": {"dtype": "bfloat16"},
    "dropout": {"lora_dropout": 0.1},
    "sdpa": {"attn_implementation": "sdpa"},
}


@pytest.mark.parametrize("name", ["all from disk", "everything"])
@pytest.mark.parametrize("more", MORE)
def test_with_more_to_do(folder: Path, waits: Waits, virtual: Controls, more: str, name: str) -> None:
    check(folder, waits, virtual.device.type, PLANS[name], **MORE[more])


CUTS: dict[str, dict[str, Any]] = {
    "chunked head": {"head": "chunked", "head_rows": 40, "loss_chunk_size": 7},
    "chunked loss": {"loss_chunk_size": 7},
    "micro-batches": {"micro_batch_size": 1},
}


@pytest.mark.parametrize("cut", CUTS)
def test_with_the_step_cut_into_pieces(folder: Path, waits: Waits, virtual: Controls, cut: str) -> None:
    check(folder, waits, virtual.device.type, replace(PLANS["everything"], **CUTS[cut]))
