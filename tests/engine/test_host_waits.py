"""What keeps a step from waiting for its device, as far as it shows without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, masking_utils

from families import save_tiny
from helpers import lema_model
from lema.engine.inputs import Batch
from lema.errors import StreamingError
from lema.machine import host_copies
from lema.machine.host_copies import to_device
from lema.models.masks import padding_known
from lema.streaming.draws import Draws
from lema.streaming.randomness import RandomState

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_tiny("gpt2", folder)
    return folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A note of every look at the random state."""
    seen: list[torch.device] = []
    real = RandomState.now.__func__  # type: ignore[attr-defined]

    def now(cls: type[RandomState], device: torch.device) -> RandomState:
        seen.append(device)
        return real(cls, device)

    monkeypatch.setattr(RandomState, "now", classmethod(now))
    return seen


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


# --- random states ----------------------------------------------------------------------------------------


def steps(trainer: Any, looks: list[torch.device], count: int) -> list[int]:
    found = []
    for _ in range(count):
        looks.clear()
        trainer.train_step(batch())
        found.append(len(looks))
    return found


def test_nothing_is_noted_at_the_layers_when_nothing_draws(gpt2: Path, looks: list[torch.device]) -> None:
    with lema_model(gpt2, micro_batch_size=1) as model:
        first, *rest = steps(model.get_trainer(None), looks, 3)
    assert first > 4 * 4 and set(rest) == {3}, (
        "the trainer's own note, one at the begin and one at the end of a forward"
    )


def test_a_forward_without_gradients_says_nothing_of_what_draws(tmp_path: Path, looks: list[torch.device]) -> None:
    save_tiny("llama", tmp_path, attention_dropout=0.1)  # no dropout module says so
    with lema_model(tmp_path) as model:
        trainer = model.get_trainer(None)
        trainer.eval_step(batch())
        assert min(steps(trainer, looks, 2)) > 2 * 4


@pytest.mark.parametrize("kind", ["module", "functional"])
def test_states_are_noted_while_something_draws(tmp_path: Path, looks: list[torch.device], kind: str) -> None:
    if kind == "module":
        save_tiny("gpt2", tmp_path, resid_pdrop=0.1)
    else:
        save_tiny("llama", tmp_path, attention_dropout=0.1)  # no dropout module says so
    with lema_model(tmp_path) as model:
        counts = steps(model.get_trainer(None), looks, 3)
    assert min(counts) > 2 * 4


def test_dropout_that_is_switched_on_later_is_seen_at_once(gpt2: Path, looks: list[torch.device]) -> None:
    with lema_model(gpt2, micro_batch_size=1) as model:
        trainer = model.get_trainer(None)
        steps(trainer, looks, 2)
        for module in model.hf_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        assert min(steps(trainer, looks, 2)) > 4 * 4


def test_draws_that_nothing_announced_are_an_error_once() -> None:
    draws = Draws([torch.nn.Linear(2, 2)])
    cpu = torch.device("cpu")
    for _ in range(2):
        draws.begin(cpu)
        draws.end()
    draws.begin(cpu)
    assert not draws.noting
    torch.rand(1)
    with pytest.raises(StreamingError, match="run this step again"):
        draws.end()
    draws.begin(cpu)
    assert draws.noting
    draws.end()


# --- masks ------------------------------------------------------------------------------------------------

PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def mask_of(config: Any, mask: torch.Tensor, sliding: bool, known: torch.Tensor | None = None) -> torch.Tensor | None:
    make = masking_utils.create_sliding_window_causal_mask if sliding else masking_utils.create_causal_mask
    with padding_known(known):
        return make(
            config=config, inputs_embeds=torch.zeros(2, 6, 8), attention_mask=mask, past_key_values=None,
            position_ids=torch.arange(6)[None],
        )  # fmt: skip


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("mask", [PADDED, torch.ones_like(PADDED), PADDED.flip(1)], ids=["right", "none", "left"])
def test_masks_are_the_same_and_nothing_is_read(
    mask: torch.Tensor, sliding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model("mistral", sliding_window=3)
    config._attn_implementation = "sdpa"
    expected = mask_of(config, mask, sliding)

    def read(*_: Any) -> Any:
        raise AssertionError("the device's mask was read")

    monkeypatch.setattr(masking_utils, "fast_all", read, raising=False)
    found = mask_of(config, mask.clone(), sliding, known=mask)
    assert (found is None) == (expected is None)
    assert found is None or expected is None or torch.equal(found, expected)


def test_a_batch_without_a_mask_gets_one_on_a_device_unless_it_is_packed() -> None:
    ids, device = torch.zeros(2, 6, dtype=torch.long), torch.device("meta")
    rising = torch.arange(6).expand(2, 6)
    for more, wanted in (({}, True), ({"position_ids": rising}, True), ({"position_ids": rising % 3}, False)):
        moved = Batch({"input_ids": ids, **more}, None, 0, 12).on(device).model_inputs
        assert ("attention_mask" in moved) == wanted
        assert (
            "attention_mask" not in Batch({"input_ids": ids, **more}, None, 0, 12).on(torch.device("cpu")).model_inputs
        )


# --- small copies -----------------------------------------------------------------------------------------


def test_a_device_without_pinned_memory_is_copied_to_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no pinned memory for the test")

    monkeypatch.setattr(host_copies, "_refused", set())
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    for _ in range(2):
        assert to_device(torch.arange(3), torch.device("meta")).device.type == "meta"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    there = torch.arange(3)
    assert to_device(there, torch.device("cpu")) is there
