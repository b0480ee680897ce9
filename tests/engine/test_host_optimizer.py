"""The optimizer's side in host memory gives the numbers that it gives beside the parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lema

pytestmark = pytest.mark.timeout(120)

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "attn_implementation": "eager",
    "lora_rank": 4,
    "lora_target_modules": "all-linear",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.05,
    "gradient_accumulation_steps": 2,
    "save_steps": 0,
    "max_seq_length": 9,
}


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 99, (2, 9), generator=generator) for _ in range(count)]


def trained(folder: Path, steps: list[torch.Tensor], resume: Path | None = None, **settings: Any) -> tuple[Any, Any]:
    model = lema.LemaModel(lema.LemaConfig(str(folder), **{**SETTINGS, **settings}))
    trainer = model.get_trainer(resume_from=resume)
    losses = [trainer.train_step(ids, ids)[1] for ids in steps]
    return trainer, losses


def adapters(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.lora_manager.get_trainable_parameters()]


def test_same_numbers_as_beside_the_parameters(llama: Path) -> None:
    steps = batches(8)
    there, losses = trained(llama, steps, optimizer_place="host")
    here, expected = trained(llama, steps)
    assert there.trainables.masters is not None
    assert here.trainables.masters is None
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(adapters(there), adapters(here), strict=True))
    assert there.last_step.grad_norm == here.last_step.grad_norm


def test_parameters_hold_no_gradients_after_the_backward(llama: Path) -> None:
    trainer, _ = trained(llama, batches(1), optimizer_place="host")
    assert all(p.grad is None for p in trainer.lora_manager.get_trainable_parameters())
    assert all(m.grad is not None for m in trainer.trainables.masters.masters)


def test_resumes_inside_a_window_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    steps = batches(7)
    whole, expected = trained(llama, steps, optimizer_place="host")
    first, losses = trained(llama, steps[:3], optimizer_place="host")
    first.save_checkpoint(tmp_path / "half")
    second, later = trained(llama, steps[3:], resume=tmp_path / "half", optimizer_place="host")
    assert losses + later == expected
    assert all(torch.equal(a, b) for a, b in zip(adapters(whole), adapters(second), strict=True))


def test_an_optimizer_of_the_users_own_with_state_moves_over(llama: Path) -> None:
    results = []
    for place in ("host", "device"):
        model = lema.LemaModel(lema.LemaConfig(str(llama), **{**SETTINGS, "optimizer_place": place}))
        optimizer = torch.optim.SGD(model.get_trainable_parameters(), lr=0.1, momentum=0.9)
        parameters = model.get_trainable_parameters()
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) * 1e-3
        optimizer.step()
        optimizer.zero_grad()
        trainer = model.get_trainer(optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for ids in batches(4):
            trainer.train_step(ids, ids)
            scheduler.step()
        results.append([p.detach().clone() for p in parameters])
        assert model.get_trainable_parameters()[0] is parameters[0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_bad_gradient_is_named_and_nothing_is_stepped(llama: Path) -> None:
    model = lema.LemaModel(lema.LemaConfig(str(llama), **{**SETTINGS, "optimizer_place": "host"}))
    trainer = model.get_trainer()
    before = adapters(trainer)
    batch = batches(1)[0]
    victim = trainer.lora_manager.get_trainable_parameters()[0]
    trainer.train_step(batch, batch)
    handle = victim.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(lema.errors.NonFiniteError, match="layer 0"):
        trainer.train_step(batch, batch)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(adapters(trainer), before, strict=True))
    trainer.train_step(batch, batch)
    trainer.train_step(batch, batch)
    assert trainer.global_step == 1
