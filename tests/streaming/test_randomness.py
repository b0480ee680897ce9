"""Random states in a checkpoint: of the host and of the device used, whichever it is."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy
import pytest
import torch

from lema.streaming.randomness import random_states, restore_random_states

State = dict[str, torch.Tensor]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> State:
    """States of devices by name, under whichever kind is asked for; the current one of each is number 1."""
    states = {name: torch.tensor([i], dtype=torch.uint8) for i, name in enumerate(("xpu.0", "xpu.1", "cuda.0"))}

    def name_of(device: torch.device) -> str:
        return f"{device.type}.{1 if device.index is None else device.index}"

    module = SimpleNamespace(
        current_device=lambda: 1,
        get_rng_state=lambda device: states[name_of(device)].clone(),
        set_rng_state=lambda state, device: states.__setitem__(name_of(device), state.clone()),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return states


def test_the_device_used_is_saved_under_torchs_name_for_it(cards: State) -> None:
    assert random_states(torch.device("cpu"))[0].keys() == {"cpu", "numpy"}
    tensors, _ = random_states(torch.device("xpu:0"))
    assert tensors.keys() == {"cpu", "numpy", "xpu.0"}
    tensors, rest = random_states(torch.device("xpu"))
    assert tensors["xpu.1"].tolist() == [1]
    drawn = torch.rand(3), numpy.random.random(3)
    cards["xpu.1"] = torch.tensor([9], dtype=torch.uint8)
    restore_random_states(tensors, rest, torch.device("xpu"))
    assert cards["xpu.1"].tolist() == [1]
    assert torch.rand(3).equal(drawn[0])
    assert (numpy.random.random(3) == drawn[1]).all()


def test_another_card_of_the_kind_goes_on_from_it(cards: State) -> None:
    tensors, rest = random_states(torch.device("xpu:0"))
    restore_random_states(tensors, rest, torch.device("xpu:1"))
    assert cards["xpu.1"].tolist() == [0]


def test_files_with_all_of_cudas_cards_load(cards: State) -> None:
    """Written before: a state a card, of which the run used one."""
    tensors, rest = random_states(torch.device("cpu"))
    tensors |= {f"cuda.{i}": torch.tensor([20 + i], dtype=torch.uint8) for i in range(3)}
    restore_random_states(tensors, rest, torch.device("cuda:2"))
    assert cards["cuda.2"].tolist() == [22]


@pytest.mark.parametrize(("saved", "now"), [("cuda:0", "xpu:0"), ("cuda:0", "cpu"), ("cpu", "xpu:0")])
def test_another_kind_of_device_says_that_dropout_differs(
    cards: State, caplog: pytest.LogCaptureFixture, saved: str, now: str
) -> None:
    tensors, rest = random_states(torch.device(saved))
    before = {name: state.clone() for name, state in cards.items()}
    with caplog.at_level(logging.WARNING, "lema"):
        restore_random_states(tensors, rest, torch.device(now))
    (record,) = caplog.records
    kinds = [torch.device(name).type for name in (saved, now)]
    assert f"drawn on {kinds[0]}, and this run draws on {kinds[1]}: dropout" in record.getMessage()
    assert all(state.equal(before[name]) for name, state in cards.items())
