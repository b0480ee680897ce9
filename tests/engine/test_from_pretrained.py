"""`lema.from_pretrained`: a model of transformers that streams, given adapters by PEFT as any other is."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lema
from families import save_tiny
from helpers import SEED
from lema.engine import joining
from lema.errors import BindingError, ConfigError, StreamingError, UnsupportedError

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("entry") / "model"
    save_tiny("llama", path)
    return path


@pytest.fixture
def opened(folder: Path) -> Iterator[Make]:
    """Opens streamed models, closed at the end."""
    models: list[Any] = []

    def make(**settings: Any) -> Any:
        values = {"device": "cpu", "dtype": "float32", "attn_implementation": "eager", **settings}
        models.append(lema.from_pretrained(folder, **values))
        return models[-1]

    yield make
    for model in models:
        lema.close(model)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def with_lora(model: Any, config: LoraConfig) -> PeftModel:
    torch.manual_seed(SEED)
    return get_peft_model(model, copy.deepcopy(config)).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def trained(model: Any, steps: int = 2) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of some steps, and the adapter after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


SETTINGS: list[dict[str, Any]] = [{}, {"ram_budget": "2GB", "ram_layers": 0, "keep_activations": 1}]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head alone": {"target_modules": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens"], "lora_dropout": 0.3},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.3, "target_modules": ["v_proj", "down_proj"]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", SETTINGS, ids=["unplanned", "planned"])
def test_lora_in_its_forms_is_plain_pefts(folder: Path, opened: Make, form: str, settings: dict[str, Any]) -> None:
    config = lora(**FORMS[form])
    expected, found = with_lora(plain(folder), config), with_lora(opened(**settings), config)
    start = {name: p for name, p in expected.named_parameters() if "lora_" in name}
    assert_same({name: p for name, p in found.named_parameters() if "lora_" in name}, start)
    losses, adapter = trained(found)
    expected_losses, expected_adapter = trained(expected)
    assert all(map(torch.equal, losses, expected_losses))
    assert_same(adapter, expected_adapter)


def test_dora_begins_in_one_sweep(opened: Make) -> None:
    model = opened(prefetch_depth=0)
    memory = model.lema_attachment.memory
    with_lora(model, lora())
    assert memory.stats.loads == 0
    fresh = opened(prefetch_depth=0)
    with_lora(fresh, lora(use_dora=True))
    assert fresh.lema_attachment.memory.stats.loads == len(fresh.model.layers)


def test_adapters_are_switched_as_plain_pefts(folder: Path, opened: Make) -> None:
    def outputs(model: PeftModel) -> list[torch.Tensor]:
        torch.manual_seed(SEED)
        model.add_adapter("other", lora(use_dora=True, target_modules=["q_proj"], init_lora_weights=False))
        found = []
        for name in ("other", "default"):
            model.set_adapter(name)
            loss = model(**batch()).loss
            loss.backward()
            found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        with model.disable_adapter():
            found.append(model(**batch()).logits.detach())
        return found

    config = lora(init_lora_weights=False)
    expected, found = outputs(with_lora(plain(folder), config)), outputs(with_lora(opened(), config))
    assert len(found) == len(expected) > 50
    assert all(map(torch.equal, found, expected))


def test_what_starts_from_or_changes_the_base_is_refused_by_name(opened: Make) -> None:
    for settings, said in (
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "DoRA on embeddings"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            get_peft_model(opened(), lora(**settings))
    with pytest.raises(UnsupportedError, match="IA3"):
        get_peft_model(opened(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    second = get_peft_model(opened(), lora())
    with pytest.raises(UnsupportedError, match="pissa"):
        second.add_adapter("second", lora(init_lora_weights="pissa"))


def test_what_would_harm_the_base_is_refused(folder: Path, opened: Make, tmp_path: Path) -> None:
    model = opened()
    peft_model = with_lora(model, lora(init_lora_weights=False))
    for deed in (
        peft_model.merge_adapter, peft_model.merge_and_unload, peft_model.half, lambda: copy.deepcopy(peft_model),
        lambda: model.save_pretrained(tmp_path), lambda: peft_model.to("meta"),
    ):  # fmt: skip
        with pytest.raises(BindingError):
            deed()
    with pytest.raises(UnsupportedError, match="DataParallel"):
        nn.DataParallel(peft_model)
    expected = with_lora(plain(folder), lora(init_lora_weights=False))
    assert torch.equal(peft_model(**batch()).loss, expected(**batch()).loss)


def test_a_saved_adapter_is_plain_pefts(folder: Path, opened: Make, tmp_path: Path) -> None:
    for name, model in (("plain", plain(folder)), ("lema", opened())):
        peft_model = with_lora(model, lora(init_lora_weights=False))
        peft_model.save_pretrained(tmp_path / name)
    saved, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lema", "plain"))
    assert_same(saved, expected)
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("lema", "plain")]
    assert texts[0] == texts[1]
    again = PeftModel.from_pretrained(opened(), tmp_path / "plain").train(False)
    other = PeftModel.from_pretrained(plain(folder), tmp_path / "lema").train(False)
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, other(**batch()).logits)


def test_adapters_of_transformers_own_are_saved(folder: Path, opened: Make, tmp_path: Path) -> None:
    for name, model in (("plain", plain(folder)), ("lema", opened())):
        torch.manual_seed(SEED)
        model.add_adapter(lora(init_lora_weights=False))
        model.save_pretrained(tmp_path / name)
    saved, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lema", "plain"))
    assert_same(saved, expected)
    assert not list((tmp_path / "lema").glob("model*"))


def test_it_says_of_itself_what_a_resident_model_does(folder: Path, opened: Make) -> None:
    model, other = opened(), plain(folder)
    assert type(model) is LlamaForCausalLM and not model.training
    assert (model.device, model.dtype, model.name_or_path) == (other.device, other.dtype, other.name_or_path)
    assert not hasattr(model, "hf_device_map") and not hasattr(other, "hf_device_map")
    assert model.num_parameters() == other.num_parameters()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [*model.state_dict()] == [*other.state_dict()]
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, other.eval()(**batch()).logits)
    assert prepare_model_for_kbit_training(model) is model


def test_a_cast_by_kbit_training_is_refused_before_anything_is_computed(opened: Make) -> None:
    model = prepare_model_for_kbit_training(opened(dtype="bfloat16"))
    with pytest.raises(BindingError, match="moved away"):
        model(**batch())


def test_a_head_is_there_whenever_it_is_asked_for(folder: Path, opened: Make) -> None:
    weight = plain(folder).lm_head.weight
    for settings in ({}, {"ram_budget": "2GB"}, {"num_slots": 3, "ram_layers": 1}):
        assert torch.equal(opened(**settings).lm_head.weight, weight)


def test_the_type_is_that_of_the_files_if_nothing_else_is_said(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = lema.from_pretrained(tmp_path, device="cpu")
    assert model.dtype is torch.bfloat16
    lema.close(model)


def test_a_model_nobody_holds_gives_threads_and_memory_back(folder: Path) -> None:
    gc.collect()
    before, told = set(threading.enumerate()), len(joining._told)
    model: Any = with_lora(lema.from_pretrained(folder, device="cpu", dtype="float32"), lora(use_dora=True))
    trained(model, 1)
    base = weakref.ref(model.get_base_model())
    assert len(joining._told) == told + 1
    del model
    gc.collect()
    assert base() is None
    assert set(threading.enumerate()) <= before
    assert len(joining._told) == told


def test_a_closed_model_keeps_its_adapter_and_refuses_calls(folder: Path, tmp_path: Path) -> None:
    model = with_lora(lema.from_pretrained(folder, device="cpu", dtype="float32"), lora())
    lema.close(model)
    lema.close(model)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(StreamingError, match="closed"):
        model(**batch())
    with pytest.raises(ConfigError, match="nothing to close"):
        lema.close(nn.Linear(1, 1))


def test_settings_of_no_meaning_here_are_refused(folder: Path) -> None:
    for name, said in (("head", "stays in memory"), ("learning_rate", "no setting"), ("ram_budgets", "ram_budget")):
        with pytest.raises((ConfigError, TypeError), match=said):
            lema.from_pretrained(folder, **{name: 1})
