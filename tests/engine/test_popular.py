"""The families that people fine-tune, whatever travels between their layers: every way a step can be cut and kept,
against plain PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lema
from families import HANDING_ON, save_tiny
from helpers import (
    Pair,
    adapter_of,
    assert_as_exact_as_plain,
    cut_into,
    differing,
    lema_model,
    lema_step,
    padded_batch,
    plain_step,
    randomise,
    recorded,
    recording_trainer,
    relative,
)
from lema.errors import UnsupportedError
from lema.export.merge import merge
from lema.planning import probe
from lema.planning.hardware import Hardware

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "in_proj"]
TARGETS: dict[str, Any] = {"nemotron_h": ATTENTION, "granitemoehybrid": [*ATTENTION, "input_linear", "output_linear"]}
"""Where PEFT refuses all linear modules."""
POPULAR: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in HANDING_ON},
    **{family: (family, {}) for family in ("gpt_oss", "granitemoehybrid", "nemotron_h", "deepseek_v3", "glm4_moe")},
    "lfm2_moe": ("lfm2_moe", {}),
    "phi4": ("phi3", {"partial_rotary_factor": 0.75, "head_dim": 8}),
}
MACHINE = Hardware(
    "made up", "cpu", 0, 8 * 10**9, 1e6, math.inf, dict.fromkeys(("float32", "bfloat16", "float16"), 1e9)
)


@pytest.fixture(scope="module", params=POPULAR)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family, settings = POPULAR[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    whole = save_tiny(family, folder, **settings)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, save_original_format=False)  # experts in one piece, so that activations may be kept
    made = Pair.of(folder, lora_target_modules=TARGETS.get(family, "all-linear"), loss_chunk_size=None)
    yield made
    made.close()


def copied(pair: Pair, **settings: Any) -> lema.LemaModel:
    """Another streamed model of the same files with the same adapter."""
    model = lema_model(pair.folder, **{"lora_target_modules": pair.targets, "loss_chunk_size": None, **settings})
    own = adapter_of(pair.plain)
    with torch.no_grad():
        for name, parameter in adapter_of(model.hf_model).items():
            parameter.copy_(own[name])
    model.hf_model.train()
    return model


def test_loss_and_every_gradient_are_plain_pefts(pair: Pair) -> None:
    batch = padded_batch()
    expected_loss, expected = plain_step(pair.plain, batch)
    for _ in range(2):
        loss, found = lema_step(pair.model, batch)
        assert relative(loss, expected_loss) <= 1e-6
        assert not differing(expected, found)


@pytest.mark.parametrize(("micro", "chunk"), [(1, 3), pytest.param(2, None, marks=pytest.mark.long)])
def test_a_batch_in_pieces_is_as_exact_as_plain_peft(pair: Pair, micro: int, chunk: int | None) -> None:
    batch = padded_batch(5, 9)
    expected_loss, plain = plain_step(pair.plain, batch)
    trainer = recording_trainer(pair.model)
    with cut_into(pair.model, micro, chunk):
        loss, found = lema_step(pair.model, batch, trainer)
    assert relative(loss, expected_loss) <= 1e-6
    assert_as_exact_as_plain(pair.reference(batch), plain, found)


@pytest.mark.long
def test_unequal_calls_are_the_one_large_batch(pair: Pair) -> None:
    whole = padded_batch(5, 9)
    expected_loss, plain = plain_step(pair.plain, whole)
    trainer = recording_trainer(pair.model)
    trainer.window.length = 2
    losses, targets = [], []
    for rows in (slice(0, 2), slice(2, 5)):
        piece = {name: value[rows] for name, value in whole.items()}
        losses.append(trainer.train_step(piece)[1])
        targets.append(int((piece["labels"][:, 1:] != -100).sum()))
    mean = sum(float(loss or 0) * n for loss, n in zip(losses, targets, strict=True)) / sum(targets)
    assert relative(mean, expected_loss) <= 1e-6
    assert_as_exact_as_plain(pair.reference(whole), plain, recorded(trainer, pair.model.hf_model))


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"keep_activations": 3}, {}, {"micro_batch_size": 1}], ids=str)
def test_a_budget_and_kept_activations_change_nothing(
    pair: Pair, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "profile", lambda device, path=None: MACHINE)
    batch = padded_batch()
    _, expected = plain_step(pair.plain, batch)
    with copied(pair, ram_budget="2GB", batch_size=4, max_seq_length=10, **settings) as model:
        trainer = recording_trainer(model)
        _, found = lema_step(model, batch, trainer)
        if "micro_batch_size" in settings:
            assert_as_exact_as_plain(pair.reference(batch), expected, found)
        else:
            assert not differing(expected, found)


@pytest.mark.long
def test_generation_gives_the_same_tokens(pair: Pair) -> None:
    batch = padded_batch()
    given = {"input_ids": batch["input_ids"][1:3], "attention_mask": batch["attention_mask"][1:3]}
    pair.plain.eval()
    expected = pair.plain.generate(**given, max_new_tokens=6, do_sample=False)
    pair.plain.train()
    assert torch.equal(pair.model.generate(given, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.long
def test_saved_loaded_by_peft_and_merged(pair: Pair, tmp_path: Path) -> None:
    pair.model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(pair.folder, attn_implementation="eager")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert not differing(dict(adapter_of(pair.plain)), dict(adapter_of(again)))
    if pair.plain.config.model_type == "zamba2":
        with pytest.raises(UnsupportedError, match="ties"):
            merge(tmp_path / "adapter", tmp_path / "merged", base=pair.folder)
        return
    again.merge_and_unload().save_pretrained(tmp_path / "peft", save_original_format=False)
    merge(tmp_path / "adapter", tmp_path / "merged", base=pair.folder)
    expected, found = (
        {name: t for file in (tmp_path / which).glob("*.safetensors") for name, t in load_file(file).items()}
        for which in ("peft", "merged")
    )
    assert not [n for n in expected if not torch.allclose(found[n], expected[n], rtol=0, atol=1e-6)]


@pytest.mark.long
def test_resumed_is_as_never_stopped(pair: Pair, tmp_path: Path) -> None:
    ends = []
    for stopped in (False, True):
        model = copied(pair, learning_rate=1e-2)
        trainer = model.get_trainer()
        for step in range(3):
            if step == 2 and stopped:
                trainer.save_checkpoint(tmp_path / "checkpoint")
                model.close()
                model = copied(pair, learning_rate=1e-2)
                randomise(model.hf_model, seed=5)
                trainer = model.get_trainer(resume_from=tmp_path / "checkpoint")
            trainer.train_step(padded_batch(seed=step))
        ends.append({n: p.detach().clone() for n, p in adapter_of(model.hf_model).items()})
        model.close()
    assert not differing(*ends)
