"""Packed rows do not see each other: by logits, loss and gradients, for every family or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lema
from data_helpers import byte_dataset, numbered_rows
from families import FAMILIES, HANDING_ON, MIXING, save_tiny, tiny_config
from helpers import Batch, gradients_of, lema_model, lema_step, recording_trainer, relative
from lema.data import BatchStream, EncodedRow, collate, collate_packed
from lema.engine.packing import check_packing
from lema.errors import UnsupportedError
from lema.models import get_adapter

NO_SDPA = {"gemma2", "gpt_oss", "gptj", "mamba2", "bloom", "mpt", "glm_moe_dsa"}
"""Families that transformers has no sdpa for."""


def random_rows(*lengths: int, seed: int = 0, vocabulary: int = 99) -> list[EncodedRow]:
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocabulary, (n,), generator=random).tolist() for n in lengths]
    return [EncodedRow(ids, [-100, *ids[1:]]) for ids in rows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rotary positions, a sliding window, and learned absolute positions."""
    made = {family: tmp_path_factory.mktemp("packing") / family for family in ("llama", "mistral", "gpt2")}
    for family, path in made.items():
        save_tiny(family, path, vocab_size=400)
    return made


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def logits_of(model: lema.LemaModel, batch: Batch) -> torch.Tensor:
    logits, _ = recording_trainer(model).eval_step(batch, return_logits=True)
    assert logits is not None
    return logits


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_a_row_in_a_pack_is_computed_as_if_alone(folder: Path, attn: str, micro: int | None) -> None:
    rows = random_rows(7, 9, 1, 4, 12, 5, 8)
    packs = [rows[:3], rows[3:5], rows[5:]]
    with lema_model(folder, attn_implementation=attn, micro_batch_size=micro) as model:
        packed = logits_of(model, collate_packed(packs, 0))
        for i, pack in enumerate(packs):
            at = 0
            for row in pack:
                alone = logits_of(model, collate([row], 0))[0] if len(row.input_ids) > 1 else None
                found = packed[i, at : at + len(row.input_ids)]
                at += len(row.input_ids)
                if alone is not None:
                    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_other_rows_of_the_pack_change_no_bit(folder: Path, attn: str) -> None:
    first, second = random_rows(6, 6, seed=1)
    (last,) = random_rows(7, seed=2)
    with lema_model(folder, attn_implementation=attn) as model:
        one = logits_of(model, collate_packed([[first, last]], 0))[:, 6:]
        other = logits_of(model, collate_packed([[second, last]], 0))[:, 6:]
    assert torch.equal(one, other)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_loss_and_gradients_do_not_depend_on_packing_padding_or_micro_batches(
    folders: dict[str, Path], family: str, attn: str
) -> None:
    rows = random_rows(7, 9, 2, 4, 12, 5, 8)
    batches = {
        "right": collate(rows, 0), "left": collate(rows, 0, "left"),
        "packed": collate_packed([rows[:3], rows[3:5], rows[5:]], 0), "one pack": collate_packed([rows], 0),
    }  # fmt: skip
    expected: tuple[float, Any] | None = None
    for micro in (None, 1):
        with lema_model(folders[family], attn_implementation=attn, micro_batch_size=micro) as model:
            trainer = recording_trainer(model)
            random = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in model.get_trainable_parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
            for name, batch in batches.items():
                loss, gradients = lema_step(model, batch, trainer)
                expected = expected or (loss, gradients)
                assert relative(loss, expected[0]) < 1e-6, name
                for key, gradient in gradients.items():
                    error = (gradient - expected[1][key]).norm() / expected[1][key].norm()
                    assert error < 1e-5, (name, key, float(error))
            gradients_of(model.hf_model)


def test_an_epoch_of_a_packed_stream_has_the_loss_of_an_unpacked_one(folder: Path) -> None:
    dataset = byte_dataset(numbered_rows(17, longest=28), max_seq_length=40)
    sums = {}
    with lema_model(folder, micro_batch_size=2) as model:
        trainer = recording_trainer(model)
        for packing in (False, True):
            total = targets = 0.0
            for batch in BatchStream(dataset, 3, packing=packing, repeat=False):
                _, loss = trainer.eval_step(batch.inputs)
                assert loss is not None and trainer.last_step is not None
                assert trainer.last_step.num_targets == batch.targets
                total, targets = total + loss * batch.targets, targets + batch.targets
            sums[packing] = (total / targets, targets)
    assert sums[True][1] == sums[False][1]
    assert relative(sums[True][0], sums[False][0]) < 1e-6


def config_of(family: str) -> Any:
    """Positions are chosen among more than there are: of equal scores, zeros, others are taken in another place."""
    return tiny_config(family, **({"index_topk": 16} if family == "glm_moe_dsa" else {}))


def leak(family: str, attn: str) -> float:
    """How far logits of a packed row are from those of the row alone, in plain transformers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), attn_implementation=attn).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        first, second = random_rows(6, 7)
        batch = collate_packed([[first, second]], 0)
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = model(input_ids=torch.tensor([second.input_ids]), use_cache=False).logits
    return float((packed[:, 6:] - alone).abs().max())


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXING, *HANDING_ON])
def test_families_that_leak_are_refused_by_name_and_no_others(family: str, attn: str) -> None:
    if attn == "sdpa" and family in NO_SDPA:
        pytest.skip("has no sdpa")
    adapter = get_adapter(family, config_of(family).to_dict())
    adapter.configure(torch.float32, attn)
    lm = adapter.causal_lm()
    if leak(family, attn) > 1e-5:
        with pytest.raises(UnsupportedError, match=rf"{type(lm.module).__name__}.*packed rows.*packing: false"):
            check_packing(lm)
    else:
        check_packing(lm)


def test_both_kinds_of_families_were_among_them() -> None:
    kept_apart = [family for family in ("llama", "gemma3n_text", "gemma4_text") if leak(family, "eager") <= 1e-5]
    mixed = [family for family in ("opt", "falcon_h1", "zamba2") if leak(family, "eager") > 1e-5]
    assert "llama" in kept_apart and len(kept_apart) > 1 and mixed == ["opt", "falcon_h1", "zamba2"]


def test_dropout_is_no_reason_to_refuse(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path, embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)
    with lema_model(tmp_path) as model:
        module = model.hf_model.train()
        before = torch.get_rng_state()
        check_packing(model.adapter.causal_lm())
        assert module.training and torch.equal(torch.get_rng_state(), before)
        recording_trainer(model).train_step(collate_packed([random_rows(5, 6)], 0))


def test_a_step_refuses_a_packed_batch_of_a_family_that_leaks(tmp_path: Path) -> None:
    save_tiny("opt", tmp_path)
    with lema_model(tmp_path) as model:
        trainer = recording_trainer(model)
        with pytest.raises(UnsupportedError, match="OPTForCausalLM cannot train on packed rows"):
            trainer.train_step(collate_packed([random_rows(5, 6)], 0))
        trainer.train_step(collate(random_rows(5, 6), 0))


def test_the_layer_that_leaks_is_named_though_it_is_given_a_mask() -> None:
    adapter = get_adapter("falcon_h1", tiny_config("falcon_h1").to_dict())
    adapter.configure(torch.bfloat16, "sdpa")
    with pytest.raises(
        UnsupportedError, match=r"its layer 0 \(FalconH1DecoderLayer\) a row changes with the row before"
    ):
        check_packing(adapter.causal_lm())


def test_reduced_precision_around_it_is_no_leak() -> None:
    adapter = get_adapter("llama", tiny_config("llama").to_dict())
    adapter.configure(torch.float32, "sdpa")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            check_packing(adapter.causal_lm())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_trying_a_model_leaves_it_as_it_was(folder: Path) -> None:
    with lema_model(folder) as model:
        lm = model.adapter.causal_lm()
        before = {name: (id(p), p.data_ptr(), p._version) for name, p in lm.module.named_parameters()}
        check_packing(lm)
        assert before == {name: (id(p), p.data_ptr(), p._version) for name, p in lm.module.named_parameters()}
        assert model.hf_model.training
        batch = collate_packed([random_rows(5, 6)], 0)
        assert recording_trainer(model).train_step(batch)[1] is not None


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one setting only")
def test_the_newer_setting_of_precision_is_no_fault() -> None:
    adapter = get_adapter("llama", tiny_config("llama").to_dict())
    adapter.configure(torch.float32, "sdpa")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check_packing(adapter.causal_lm())
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
