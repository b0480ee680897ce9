"""What is put in place of a model's own, and that it comes off without a trace."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lema
from families import save_tiny
from helpers import adapter_of, gradients_of, lema_config, padded_batch
from lema.engine.assembly import StoredModel
from lema.engine.attach import Attachment, attach
from lema.errors import BindingError, PlanError
from lema.models.interceptor import Interceptor

pytestmark = pytest.mark.timeout(120)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head in pieces": {"head": "chunked", "ram_budget": "2GB"},
    "without adapters": {"use_lora": False},
}


def bare(folder: Path, **settings: Any) -> tuple[lema.LemaModel, nn.Module | None]:
    """A model whose weights have their places and whose layers do not wait for them any more."""
    model = lema.LemaModel(lema_config(folder, **settings))
    model.attachment.detach()
    if model.lora_manager is None:
        return model, None
    peft_model: nn.Module = model.lora_manager.attach(model.adapter)
    random = torch.Generator().manual_seed(1)
    for name, parameter in adapter_of(peft_model).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model, peft_model


def attached(model: lema.LemaModel, peft_model: nn.Module | None) -> Attachment:
    """The model attached by its plan once more."""
    attachment = attach(StoredModel(model.adapter, model.gbi), model.memory.plan)
    attachment.guard(peft_model)
    return attachment


def traces(module: nn.Module) -> dict[str, int]:
    """Identity of every attribute of every module, and how many hooks there are of each kind."""
    found = {}
    for path, part in module.named_modules():
        for key, value in part.__dict__.items():
            found[f"{path}.{key}"] = len(value) if key.endswith("_hooks") else id(value)
    return found


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the adapters."""
    output = model(**padded_batch())
    if output.loss.requires_grad:
        output.loss.backward()
    return output.logits.detach(), gradients_of(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_model_is_as_it_was_after_detach_and_can_be_attached_again(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(family, tmp_path)
    model, peft_model = bare(tmp_path, **settings)
    lm = model.adapter.causal_lm()
    whole = peft_model or lm.module
    before, names = traces(whole), lm.interceptor.names
    results = []
    for _ in range(2):
        attachment = attached(model, peft_model)
        assert traces(whole) != before
        assert {"layers", "sweeps", "guards"} <= {*lm.interceptor.names}
        results.append(step(whole))
        attachment.detach()
        assert traces(whole) == before and lm.interceptor.names == names
    (logits, gradients), (again, gradients_again) = results
    assert torch.equal(logits, again)
    assert bool(gradients) == (peft_model is not None)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    model.close()


def test_attaching_takes_off_what_was_attached_before(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, peft_model = bare(tmp_path)
    lm = model.adapter.causal_lm()
    attached(model, peft_model)
    once = set(traces(peft_model or lm.module))
    second = attached(model, peft_model)
    assert set(traces(peft_model or lm.module)) == once
    assert len(lm.module._forward_pre_hooks) == 1
    second.detach()
    assert not lm.module._forward_pre_hooks
    model.close()


def test_a_plan_for_another_device_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with lema.LemaModel(lema_config(tmp_path)) as model:
        plan = dataclasses.replace(model.memory.plan, device="cuda")
        with pytest.raises(PlanError, match="device='cuda', and this model computes on 'cpu'"):
            attach(StoredModel(model.adapter, model.gbi), plan, "cpu")


def test_what_somebody_else_put_on_top_is_left_to_them(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, peft_model = bare(tmp_path)
    lm = model.adapter.causal_lm()
    attachment = attached(model, peft_model)
    layer = lm.layers[1]
    ours, theirs = layer.forward, lambda *args, **kwargs: ours(*args, **kwargs)
    layer.forward = theirs
    with pytest.raises(BindingError, match="forward of LlamaDecoderLayer"):
        attachment.detach()
    assert layer.__dict__["forward"] is theirs and "layers" in lm.interceptor.names
    layer.forward = ours
    attachment.detach()
    assert "forward" not in layer.__dict__
    model.close()


def test_forwards_replaced_twice_come_back_in_order() -> None:
    shared, own = nn.Identity(), Interceptor()
    with own.replaced([shared, shared], [lambda x: x + 1, lambda x: x + 2]):
        assert shared(1) == 3
        with own.replaced([shared], [lambda x: -x]):
            assert shared(1) == -1 and len(own.names) == 2
        assert shared(1) == 3
    assert "forward" not in shared.__dict__ and not own.names


def test_a_gate_goes_with_its_module_when_that_is_copied() -> None:
    module = nn.Linear(2, 3)
    gate = Interceptor().gate("linear", module)
    x = torch.ones(1, 2)
    expected = torch.nn.functional.linear(x, module.weight, module.bias)
    other = copy.deepcopy(module)
    nn.init.zeros_(other.weight)
    with gate.taken_by(lambda x: x):
        assert torch.equal(module(x), x)
        assert torch.equal(other(x), other.bias.expand(1, 3))
    assert torch.equal(module(x), expected)
    assert list(inspect.signature(module.forward).parameters) == ["input"]
