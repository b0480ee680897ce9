"""fp16's loss scale beside torch's GradScaler, which reads the device for what the host knows already."""

from __future__ import annotations

import random

import pytest
import torch

from lema.engine.loss_scale import LossScale
from lema.engine.update import step_optimizer


@pytest.mark.parametrize("seed", range(4))
def test_steps_scale_and_state_are_those_of_grad_scaler_to_the_last_bit(seed: int) -> None:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = ([torch.nn.Parameter(torch.ones(5, 3)), torch.nn.Parameter(torch.zeros(7))] for _ in range(2))
    optimizers = [torch.optim.AdamW(parameters, lr=0.1) for parameters in (ours, theirs)]
    scale = LossScale(True, 1024.0, growth_interval=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scaler.scale(torch.ones(()))
    for _ in range(25):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(mine.shape, generator=generator) * 1000
            if draw.random() < 0.15:
                gradient.view(-1)[draw.randrange(gradient.numel())] = draw.choice([float("inf"), float("nan")])
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        step_optimizer(optimizers[0], scale, ours, 0.5)
        scaler.unscale_(optimizers[1])
        torch.nn.utils.clip_grads_with_norm_(theirs, 0.5, torch.nn.utils.get_total_norm([p.grad for p in theirs]))
        scaler.step(optimizers[1])
        scaler.update()
        assert scale.state_dict() == scaler.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    again = LossScale(True)
    again.load_state_dict(scaler.state_dict())
    assert again == scale


def test_a_scale_that_cannot_grow_stays() -> None:
    scale = LossScale(True, 2.0**127, growth_interval=1)
    scale.update(True)
    assert scale.scale == 2.0**127
    off = LossScale(False)
    off.update(False)
    assert off.factor == 1.0 and off.state_dict() == {}
