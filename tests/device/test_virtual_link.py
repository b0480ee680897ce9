"""What only a device that runs beside the host shows of the link to it: no gaps between copies, nothing kept."""

from __future__ import annotations

import gc
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from families import save_tiny
from helpers import lema_model, padded_batch
from lema.streaming.device_tier import DeviceTier
from lema.streaming.slot_cache import Load
from lema.streaming.timeline import COPY
from virtual_device.controls import Controls

pytestmark = [pytest.mark.accelerator, pytest.mark.timeout(240)]

COPY_SECONDS = 0.03


def test_the_link_has_no_gaps_between_layers(
    virtual: Controls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one layer crosses the link the next one's copy is enqueued behind it, so the link never waits."""
    save_tiny("llama", tmp_path, num_hidden_layers=8)
    enqueued: list[tuple[int, float]] = []
    enqueue = DeviceTier._enqueue

    def noted(self: DeviceTier, load: Load, host_slot: int) -> None:
        enqueue(self, load, host_slot)
        enqueued.append((load.unit, time.perf_counter()))

    with lema_model(tmp_path, device=str(virtual.device), vram_buffer_size=3, num_slots=3) as model:
        trainer = model.get_trainer()
        batch = padded_batch(rows=1)
        for _ in range(2):
            trainer.train_step(batch)
        monkeypatch.setattr(DeviceTier, "_enqueue", noted)
        with virtual.delays(to_device=COPY_SECONDS), trainer.memory.timeline.recording() as record:
            trainer.eval_step(batch)
    ended = {
        span.name: record.started + span.end
        for span in record.spans
        if span.lane == COPY and span.nbytes and not span.cut
    }
    ends = [(ended[f"layer {unit}"], begun) for (unit, _), (_, begun) in pairwise(enqueued) if f"layer {unit}" in ended]
    assert len(ends) >= 4
    late = [number for number, (end, begun) in enumerate(ends) if begun > end]
    assert len(late) <= 1, f"of {len(ends)} copies {late} had ended before the next was enqueued"


def kept(virtual: Controls) -> tuple[int, int]:
    """Objects of the host and bytes of the device that are alive."""
    torch.accelerator.synchronize()
    gc.collect()
    return len(gc.get_objects()), torch.accelerator.memory_allocated()


def a_long_generation(virtual: Controls, folder: Path, tokens: int) -> None:
    save_tiny("llama", folder, num_hidden_layers=3, max_position_embeddings=64)
    with lema_model(folder, device=str(virtual.device)) as model, torch.no_grad():
        ids = torch.tensor([[5, 6]])

        def generate(count: int) -> None:
            for _ in range(count // 40):
                model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)

        generate(80)
        objects, nbytes = kept(virtual)
        generate(tokens)
        later, later_bytes = kept(virtual)
        pairs = model.memory._tier._waits
        assert len(pairs._open) + len(pairs._spare) < 64
    assert later_bytes <= nbytes + 4096
    assert later - objects < tokens / 4, "less than an object for every fourth token"


def test_a_long_generation_keeps_nothing(virtual: Controls, tmp_path: Path) -> None:
    a_long_generation(virtual, tmp_path, 400)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_tokens_keep_nothing(virtual: Controls, tmp_path: Path) -> None:
    a_long_generation(virtual, tmp_path, 20_000)
