"""A model is tried before it is trained: what its own forward does beside the layers is right, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families import TRANSFORMING, save_tiny, tiny_config
from helpers import (
    Pair,
    assert_as_exact_as_plain,
    cut_into,
    differing,
    lema_model,
    lema_step,
    padded_batch,
    plain_step,
    recording_trainer,
    relative,
)
from lema.engine import trial
from lema.engine.trial import fault_of_training
from lema.errors import UnsupportedError
from lema.models import get_adapter
from lema.models.lora import LoRAManager

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", params=sorted(TRANSFORMING))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder)
    made = Pair.of(folder, loss_chunk_size=None)
    yield made
    made.close()


# -- modules between decoder and head --------------------------------------------------------------


def test_adapters_before_the_head_learn_as_plain_pefts(pair: Pair) -> None:
    batch = padded_batch()
    expected_loss, expected = plain_step(pair.plain, batch)
    loss, found = lema_step(pair.model, batch)
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
    before_head = [name for name in expected if ".layer" not in name and "lora_B" in name]
    assert any(bool(expected[name].any()) for name in before_head)


def test_they_do_in_chunks_of_the_loss_as_well(pair: Pair) -> None:
    batch = padded_batch(5, 9)
    expected_loss, expected = plain_step(pair.plain, batch)
    trainer = recording_trainer(pair.model)
    with cut_into(pair.model, chunk=3):
        loss, found = lema_step(pair.model, batch, trainer)
    assert relative(loss, expected_loss) <= 1e-6
    assert_as_exact_as_plain(pair.reference(batch), expected, found)


def test_a_lost_gradient_before_the_head_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("bert", tmp_path)
    compute_loss = trial.compute_loss

    def forgetful(*args: Any, trained: Any, **kwargs: Any) -> Any:
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trial, "compute_loss", forgetful)
    with lema_model(tmp_path) as model:
        with pytest.raises(UnsupportedError, match=r"cls\.predictions\.transform\.dense of BertLMHeadModel"):
            model.get_trainer()


# -- a loss of the family's own --------------------------------------------------------------------


def test_a_term_that_a_family_adds_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny("bamba", tmp_path, z_loss_coefficient=0.1)
    with lema_model(tmp_path, lora_target_modules=["q_proj", "v_proj"]) as model:
        with pytest.raises(UnsupportedError, match=r"the loss of BambaForCausalLM .*z_loss_coefficient: 0\.1"):
            model.get_trainer()
        assert model.generate(padded_batch()["input_ids"][2:3], max_new_tokens=2).shape == (1, 12)


def test_without_the_term_it_is_trained(tmp_path: Path) -> None:
    save_tiny("bamba", tmp_path, z_loss_coefficient=0.0)
    with lema_model(tmp_path, lora_target_modules=["q_proj", "v_proj"]) as model:
        assert recording_trainer(model).train_step(padded_batch())[1] is not None


def test_a_loss_without_a_shift_is_refused(tmp_path: Path) -> None:
    save_tiny("trocr", tmp_path, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
    with lema_model(tmp_path) as model, pytest.raises(UnsupportedError, match="the loss of TrOCRForCausalLM"):
        model.get_trainer()


# -- a parameter without a gradient ----------------------------------------------------------------


def test_an_adapter_that_text_does_not_reach_is_refused_and_can_be_left_out(tmp_path: Path) -> None:
    save_tiny("big_bird", tmp_path, is_decoder=True, attention_type="original_full", attention_probs_dropout_prob=0.0)
    with lema_model(tmp_path) as model, pytest.raises(UnsupportedError, match=r"bert\.pooler.*exclude_modules"):
        model.get_trainer()
    with lema_model(tmp_path, exclude_modules=["pooler"]) as model:
        assert recording_trainer(model).train_step(padded_batch())[1] is not None


def test_a_module_that_nothing_calls_is_refused() -> None:
    lm = made_llama()
    lm.module.model.never_called = nn.Linear(32, 32)
    assert fault_of_training(lm).startswith("nothing that LlamaForCausalLM computes of text uses model.never_called")


def test_an_adapter_that_its_layer_does_not_use_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny("glm_moe_dsa", tmp_path)
    with lema_model(tmp_path) as model:
        trainer = recording_trainer(model)
        trainer.train_step(padded_batch())
        assert "no gradient" not in caplog.text
        for _ in range(2):
            trainer.train_step(padded_batch())
    (said,) = [record.getMessage() for record in caplog.records if "no gradient" in record.message]
    assert "model.layers.*.self_attn.indexer.wk" in said and "o_proj" not in said and "exclude_modules" in said


def made_llama() -> Any:
    adapter = get_adapter("llama", tiny_config("llama").to_dict())
    LoRAManager({"target_modules": ["q_proj"]}, device="cpu").attach(adapter)
    return adapter.causal_lm()


# -- the trial itself ------------------------------------------------------------------------------


def test_the_trial_needs_no_weights_of_layers_or_head_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made_llama()

    def refuse(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        assert hidden.shape[1] == 0, "a layer or the head was run"
        return hidden.new_empty(2, 0, 99)

    for part in (*lm.layers, lm.head):
        monkeypatch.setattr(part, "forward", refuse)
    forwards = {name: module.forward for name, module in lm.module.named_modules()}
    before = torch.get_rng_state()
    lm.module.eval()
    assert fault_of_training(lm) == ""
    assert torch.equal(torch.get_rng_state(), before)
    assert not lm.module.training and all(parameter.grad is None for parameter in lm.module.parameters())
    assert {
        name: m.forward for name, m in lm.module.named_modules() if name in forwards and m is not lm.module.model
    } == {name: f for name, f in forwards.items() if lm.module.get_submodule(name) is not lm.module.model}


def test_code_that_cannot_be_tried_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made_llama()
    monkeypatch.setattr(lm.module, "forward", lambda **_: {}["loss"])
    assert fault_of_training(lm) == "LlamaForCausalLM cannot be tried on a few tokens (KeyError: 'loss')"
