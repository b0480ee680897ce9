"""A head that streams through a slot of its own gives the numbers of one that stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lema.planning.plain as plain_module
import lema.storage.reader as reader_module
from families import save_tiny
from lema import LemaConfig, LemaModel
from lema.errors import CheckpointError, ReadError, WeightsError
from lema.models.lora import LoRAManager

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _every_head_streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "adds_little" in request.node.name:
        return
    monkeypatch.setattr(plain_module, "head_should_stream", lambda head, step: True)


def make(folder: Path, **overrides: object) -> LemaModel:
    settings = {"device": "cpu", "dtype": "float32", "lora_rank": 4, "lora_alpha": 8, "seed": 7, "save_steps": 0,
                "lora_target_modules": "all-linear", "attn_implementation": "eager", "num_slots": 2,
                **overrides}  # fmt: skip
    model = LemaModel(LemaConfig(str(folder), **settings))  # type: ignore[arg-type]
    model.initialize_lora()
    return model


def randomised(*models: torch.nn.Module) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def plain(folder: Path) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi", "gpt2"])
def test_gradients_equal_to_the_last_bit(family: str, tied: bool, tmp_path: Path) -> None:
    save_tiny(family, tmp_path, tie_word_embeddings=tied)
    reference, model = plain(tmp_path), make(tmp_path)
    assert model.memory.streams_head
    randomised(reference, model.hf_model)
    ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(2))
    expected = reference(input_ids=ids, labels=ids, use_cache=False)
    expected.loss.backward()
    model.hf_model.train()
    output = model.hf_model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert torch.equal(output.logits, expected.logits)
    for name, gradient in gradients(reference).items():
        assert torch.equal(gradient, dict(model.hf_model.named_parameters())[name].grad), name
    model.close()


def test_a_step_reads_the_head_once_and_gives_its_memory_back(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tie_word_embeddings=False)
    model = make(tmp_path, loss_chunk_size=2, micro_batch_size=1)
    trainer = model.get_trainer()
    ids = torch.randint(3, 99, (3, 9))
    for _ in range(3):
        trainer.train_step(ids, labels=ids)
    assert trainer.last_step is not None
    layers, slots = model.memory.num_units, model.memory.num_slots
    assert trainer.last_step.loads == 2 * (layers - slots) + 1
    head = model.memory._head
    assert head is not None
    assert not model.memory.holds_head
    assert not bool(head.in_slot[0].any()), "the pages of a released head read as zeros"
    model.close()


def test_steps_equal_those_with_a_head_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path, tie_word_embeddings=True)
    ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(2))
    results = []
    for streams in (True, False):
        monkeypatch.setattr(plain_module, "head_should_stream", lambda head, step, streams=streams: streams)
        model = make(tmp_path)
        assert model.memory.streams_head == streams
        trainer = model.get_trainer()
        losses = [trainer.train_step(ids, labels=ids)[1] for _ in range(3)]
        generated = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        results.append((losses, generated.tolist(), [p.clone() for p in model.get_trainable_parameters()]))
        model.close()
    (losses, tokens, adapter), (losses_, tokens_, adapter_) = results
    assert losses == losses_
    assert tokens == tokens_
    assert all(torch.equal(a, b) for a, b in zip(adapter, adapter_, strict=True))


def test_a_head_streams_where_it_adds_little_to_a_step() -> None:
    gib = 1 << 30
    assert plain_module.head_should_stream(gib // 5, 5 * gib)
    assert not plain_module.head_should_stream(gib // 5, 3 * gib)
    assert not plain_module.head_should_stream(1 << 20, 5 * gib)


def test_a_head_held_over_a_forward_is_still_there_afterwards(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tie_word_embeddings=False)
    model = make(tmp_path)
    expected = model.gbi.view("lm_head.weight")
    head = model.memory._head
    assert head is not None
    for _ in range(2):
        with model.memory.use(model.memory.head_unit):
            for unit in range(model.memory.num_units):
                with model.memory.use(unit):
                    pass
            assert torch.equal(head.in_slot[0], expected)
    model.close()


def test_weights_replaced_during_a_run_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = make(tmp_path)
    trainer = model.get_trainer()
    ids = torch.randint(3, 99, (2, 9))
    trainer.train_step(ids, labels=ids)
    file = tmp_path / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        trainer.train_step(ids, labels=ids)
    model.close()


def test_a_read_error_of_the_head_names_it_and_leaves_nothing_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path, tie_word_embeddings=False)
    model = make(tmp_path)
    trainer = model.get_trainer(torch.optim.SGD(model.get_trainable_parameters(), lr=0.0))
    ids = torch.randint(3, 99, (2, 9))
    _, before = trainer.train_step(ids, labels=ids)
    record = model.gbi.record("lm_head.weight")
    real = reader_module.os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= record.offset < offset + sum(len(b) for b in buffers) and record.nbytes <= len(buffers[0]) < 2 * (
            record.nbytes + 8192
        ):
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(reader_module.os, "preadv", failing)
    with pytest.raises(ReadError, match=r"lm_head\.weight.*model\.safetensors"):
        trainer.train_step(ids, labels=ids)
    monkeypatch.setattr(reader_module.os, "preadv", real)
    assert trainer.train_step(ids, labels=ids)[1] == before
    model.close()


def test_an_adapter_of_the_original_is_imported(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = make(tmp_path, lora_target_modules=["q_proj", "down_proj"])
    manager = model.lora_manager
    assert isinstance(manager, LoRAManager)
    generator = torch.Generator().manual_seed(3)
    saved = {}
    for name, parameter in manager.named_parameters():
        layer, rest = name.split(".layers.")[1].split(".", 1)
        key = f"{int(layer) + 1}.{rest.removesuffix('.default.weight')}"
        saved[key] = torch.randn(parameter.shape, generator=generator)
    assert "1.self_attn.q_proj.lora_A" in saved
    file = tmp_path / "adapter_model.bin"
    torch.save(saved, file)
    manager.import_original(file)
    layer = model.adapter.causal_lm().layers[2]
    assert torch.equal(layer.mlp.down_proj.lora_B["default"].weight, saved["3.mlp.down_proj.lora_B"])
    torch.save({**saved, "9.mlp.down_proj.lora_A": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"9\.mlp\.down_proj\.lora_A"):
        manager.import_original(file)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        manager.import_original(file)
    with pytest.raises(FileNotFoundError):
        manager.import_original(tmp_path / "absent.bin")
    model.close()
