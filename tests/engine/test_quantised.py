"""Steps on codes: the same loss and gradients, bit for bit, as plain PEFT on what the codes' library makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")
from bnb_files import plain_of
from families import save_tiny
from helpers import (
    Pair,
    adapter_of,
    differing,
    lema_model,
    lema_step,
    padded_batch,
    plain_model,
    plain_step,
    randomise,
)
from lema.prepare import prepare

CASES = [
    (family, kind)
    for family in ("llama", "qwen3", "qwen3_moe", "gemma", "gpt_oss")
    for kind in ("nf4", "int8")
    if (family, kind) != ("gpt_oss", "int8")
]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Plain PEFT on the decoded model, and ours on the codes: experts are separate in one of the mixtures' files, and
    one tensor in the other's."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{kind}")
    save_tiny(family, folder / "source")
    made = prepare(folder / "source", folder / "codes", quantize=kind)
    assert len(made.errors) >= 4 * 4
    if family in ("qwen3_moe", "gpt_oss"):
        assert any("experts" in name for name in made.errors) and not any("router" in name for name in made.errors)
    plain = plain_model(plain_of(folder / "codes", folder / "plain"))
    model = lema_model(folder / "codes", loss_chunk_size=None)
    assert not differing(dict(adapter_of(plain)), dict(adapter_of(model.hf_model)))
    randomise(plain, model.hf_model)
    yield Pair(folder, plain, model)
    model.close()


def test_a_step_is_plain_pefts_on_the_decoded_model(pair: Pair) -> None:
    for seed in (1, 2):
        batch = padded_batch(seed=seed)
        loss, gradients = plain_step(pair.plain, batch)
        found_loss, found = lema_step(pair.model, batch)
        assert found_loss == loss
        assert not differing(gradients, found)


def test_generation_is_plain_transformers(pair: Pair) -> None:
    ids = padded_batch()["input_ids"][2:3, :5]
    pair.plain.eval(), pair.model.hf_model.eval()
    expected = pair.plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(pair.model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    pair.plain.train(), pair.model.hf_model.train()


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.29), ("int8", 0.52)])
def test_bytes_read_fall_as_the_file_does(tmp_path: Path, kind: str, share: float) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
    save_tiny("llama", tmp_path / "source", **sizes)
    half = prepare(tmp_path / "source", tmp_path / "half", dtype="bfloat16")
    codes = prepare(half.path, tmp_path / "codes", quantize=kind)
    assert codes.nbytes < half.nbytes
    batch = padded_batch()
    read = []
    for folder in (half.path, codes.path):
        with lema_model(folder, dtype="bfloat16") as model:
            trainer = model.get_trainer()
            trainer.train_step(batch)
            trainer.train_step(batch)
            read.append(trainer.last_step.bytes_read)
    assert 0 < read[1] <= share * read[0]
