"""Budgets beside the layers: where a plan's peak is counted from, and the optimizer's state, which is there once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_tiny
from helpers import lema_model
from lema.engine import opening, optimizer
from lema.machine import heap
from lema.planning import probe
from lema.planning.hardware import Hardware

pytestmark = pytest.mark.timeout(120)
MIB = 1 << 20


def test_a_plans_peak_is_counted_from_before_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    machine = Hardware(
        "made up", "cpu", 0, 8 * 10**9, 1e9, math.inf, dict.fromkeys(("float32", "bfloat16", "float16"), 1e9)
    )
    resident = {"now": 500 * MIB}
    real = opening.plan_for

    def planned(*args: Any) -> Any:
        resident["now"] += 40 * MIB  # what planning leaves behind
        return real(*args)

    monkeypatch.setattr(probe, "profile", lambda *_: machine)
    monkeypatch.setattr(opening, "resident_bytes", lambda: resident["now"])
    monkeypatch.setattr(opening, "plan_for", planned)
    with lema_model(tmp_path, ram_budget="1GB") as model:
        plan = model.memory.plan
        assert model.memory.heap_limit == 500 * MIB + plan.host_peak - plan.transient // 4


@pytest.mark.skipif(heap._glibc() is None, reason="the heap is not glibc's")
def test_the_optimizers_state_is_never_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with heap.apart_from_heap():
        pass  # leaves thresholds under which state of this size is made on the heap, as in a run
    weights = [torch.nn.Parameter(torch.zeros(512 << 10 >> 2)) for _ in range(128)]
    made = torch.optim.AdamW(weights, lr=1.0, foreach=False)
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.5)
    made.step()
    before = {id(w): made.state[w]["exp_avg_sq"].clone() for w in weights}
    resident: list[int] = []
    real = optimizer.copy_to_own_pages

    def watched(value: torch.Tensor) -> torch.Tensor:
        copy = real(value)
        resident.append(heap.resident_bytes())
        return copy

    monkeypatch.setattr(optimizer, "copy_to_own_pages", watched)
    start = heap.resident_bytes()
    optimizer.keep_state_apart(made)
    assert max(resident) - start < 48 * MIB, "of 128 MiB"
    assert all(torch.equal(made.state[w]["exp_avg_sq"], before[id(w)]) for w in weights)
