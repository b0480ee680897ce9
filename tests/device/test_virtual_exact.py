"""Streamed steps on an accelerator beside plain PEFT on the same one: every plan, every family, every verb.

With the virtual device (`--virtual-device`) the numbers are the processor's, and memory, streams and events a device's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from families import FAMILIES
from helpers import (
    differing,
    lema_model,
    lema_step,
    padded_batch,
    plain_model,
    plain_step,
    randomise,
    recording_trainer,
    relative,
)
from lema.cli.app import app
from lema.planning.plan import MemoryPlan
from spreads import LAYERS, PLANS, batch
from training_runs import StopAfter, adapter_bytes, history, make_model, settings_of, train, write_rows
from virtual_engine import DTYPES, Engine

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="session")
def device() -> str:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found.type


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Path:
    if request.param == "gpt2":
        return tiny("gpt2", n_layer=LAYERS, num_hidden_layers=LAYERS)
    return tiny("llama", num_hidden_layers=LAYERS, tie_word_embeddings=False)


class Plain:
    """The same model by transformers and PEFT, whole on the device."""

    def __init__(self, folder: Path, device: str, dtype: str = "float32", dropout: float = 0.0) -> None:
        self.model = plain_model(folder, DTYPES[dtype], dropout=dropout).to(device)
        self.device = device

    def step(self, seed: int, scale: float = 1.0, given: dict[str, torch.Tensor] | None = None) -> tuple[float, Any]:
        torch.manual_seed(seed)
        there = {name: tensor.to(self.device) for name, tensor in (given or batch()).items()}
        loss, found = plain_step(self.model, there, scale)
        return loss, {name: gradient.cpu() for name, gradient in found.items()}


def compare(folder: Path, plan: MemoryPlan, device: str, steps: int = 3, **settings: Any) -> None:
    """Every loss and every bit of every gradient."""
    plain = Plain(folder, device, settings.get("dtype", "float32"), settings.get("lora_dropout", 0.0))
    with Engine(folder, plan, device, **settings) as engine:
        engine.adopt(plain.model)
        for seed in range(steps):
            expected_loss, expected = plain.step(seed, engine.trainer.loss_scale)
            loss, found = engine.step(seed)
            assert relative(loss, expected_loss) <= 1e-6
            assert not differing(expected, found)
        engine.trainer.eval_step(batch())


# --- plans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_every_spread_gives_the_bits_of_plain_peft(folder: Path, name: str, device: str) -> None:
    compare(folder, PLANS[name], device)


@pytest.mark.parametrize("name", ["everything", "all three tiers", "boundaries on the host, graphs kept"])
def test_dropout_is_replayed(folder: Path, name: str, device: str) -> None:
    compare(folder, PLANS[name], device, lora_dropout=0.3)


@pytest.mark.parametrize("name", ["everything", "all from disk"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder: Path, name: str, dtype: str, device: str) -> None:
    compare(folder, PLANS[name], device, dtype=dtype)


CUTS: dict[str, dict[str, Any]] = {
    "chunked head": {"head": "chunked", "head_rows": 40, "loss_chunk_size": 7},
    "chunked loss": {"loss_chunk_size": 7},
    "micro-batches": {"micro_batch_size": 2},
}


@pytest.mark.parametrize("name", ["all from disk", "all three tiers", "everything"])
@pytest.mark.parametrize("cut", CUTS)
def test_steps_cut_into_pieces(tiny: Callable[..., Path], cut: str, name: str, device: str) -> None:
    folder = tiny("llama", num_hidden_layers=LAYERS, tie_word_embeddings=False)
    plain = Plain(folder, device)
    with Engine(folder, replace(PLANS[name], **CUTS[cut]), device) as engine:
        engine.adopt(plain.model)
        for seed in range(2):
            expected_loss, expected = plain.step(seed)
            loss, found = engine.step(seed)
            assert relative(loss, expected_loss) <= 1e-6
            far = [n for n, g in expected.items() if not torch.allclose(found[n], g, rtol=1e-4, atol=1e-7)]
            assert not far


def test_memory_of_the_host_is_given_back(folder: Path, device: str) -> None:
    with Engine(folder, PLANS["everything"], device) as engine:
        engine.step(0)
        buffer = engine.memory.backend._pins  # type: ignore[union-attr]
        assert buffer._buffers
    assert not buffer._buffers


# --- families ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_three_steps_of_every_family(tiny: Callable[..., Path], family: str, device: str) -> None:
    folder = tiny(family)
    plain = Plain(folder, device)
    with lema_model(folder, device=device) as model:
        randomise(plain.model, model.hf_model)
        trainer = recording_trainer(model)
        for seed in range(3):
            given = padded_batch(seed=seed)
            expected_loss, expected = plain.step(seed, given=given)
            torch.manual_seed(seed)
            loss, found = lema_step(model, given, trainer)
            assert relative(loss, expected_loss) <= 1e-6
            assert not differing(expected, {name: gradient.cpu() for name, gradient in found.items()})


# --- evaluation and generation ----------------------------------------------------------------------------


def test_generation_and_evaluation(folder: Path, device: str) -> None:
    plain = Plain(folder, device)
    with lema_model(folder, device=device) as model:
        randomise(plain.model, model.hf_model)
        trainer, given = recording_trainer(model), padded_batch()
        there = {name: tensor.to(device) for name, tensor in given.items()}
        plain.model.eval()
        with torch.no_grad():
            expected = plain.model(**there, use_cache=False)
        logits, loss = trainer.eval_step(given, return_logits=True)
        assert logits is not None and loss is not None and relative(loss, expected.loss.item()) <= 1e-6
        assert torch.equal(logits.cpu(), expected.logits.cpu())
        model.hf_model.eval()
        ids = there["input_ids"][2:]
        for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 5}):
            found = []
            for each in (plain.model, model.hf_model):
                torch.manual_seed(3)
                found.append(each.generate(input_ids=ids, max_new_tokens=8, **settings).cpu())
            assert torch.equal(*found)


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return make_model(folder / "model"), write_rows(folder / "rows.jsonl")


@pytest.mark.parametrize("step", [2, 5])
def test_a_resumed_run_is_one_never_stopped(parts: tuple[Path, Path], tmp_path: Path, step: int, device: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings_of(*parts, whole, device=device))
    settings = settings_of(*parts, cut, device=device)
    train(settings, callbacks=[StopAfter(step)])
    torch.rand(5, device=device)  # whatever happened in between
    train(settings, resume="auto")
    assert adapter_bytes(cut / "final") == adapter_bytes(whole / "final")
    assert history(cut / "final") == history(whole / "final")


def invoke(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


def test_the_command_line(parts: tuple[Path, Path], tmp_path: Path, device: str) -> None:
    model, rows = parts
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    values = settings_of(model, rows, out, device=device, max_steps=3)
    file.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items() if "budget" not in name))
    said = invoke("train", file, "--dry-run")
    assert "nothing was trained" in said and device in said
    assert "finished: 3 steps" in invoke("train", file)
    assert (out / "final" / "adapter_model.safetensors").is_file()
    planned = json.loads(invoke("plan", model, "--device", device, "--json"))
    assert planned["plan"]["device"] == device and planned["peaks"]["device"] > 0
    assert planned["hardware"]["vram_bytes"] > 0
    fitting = json.loads(invoke("plan", model, "--device", device, "--vram-budget", "100MB", "--json"))
    assert fitting["peaks"]["device"] <= 100_000_000
