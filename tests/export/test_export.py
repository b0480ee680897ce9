"""Exports: PEFT and GGUF adapters by their values, the check of adapters by every rule, and the verbs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from families import save_tiny
from helpers import lema_model, padded_batch, plain_model, randomise
from lema.cli.app import app
from lema.errors import CheckpointError, ConfigError, UnsupportedError
from lema.export.check import READERS, check_adapter
from lema.export.gguf_adapter import export_gguf
from lema.export.peft_adapter import export_peft

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, folder: Path, targets: Any = TARGETS, **lora: Any) -> PeftModel:
    """An adapter with values that do something, saved by PEFT; returns PEFT's model with it."""
    model = plain_model(base, targets=targets, **lora).eval()
    randomise(model)
    model.save_pretrained(str(folder))
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).view(1, -1), use_cache=False).logits


def edit(folder: Path, **settings: Any) -> None:
    """Change an adapter's settings on disk."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `checkpoint` as a trainer of ours saved it after a step."""
    root = tmp_path_factory.mktemp("llama")
    save_tiny("llama", root / "base")
    model = lema_model(root / "base", lora_target_modules=TARGETS, learning_rate=0.1)
    trainer = model.get_trainer()
    for _ in range(2):
        trainer.train_step(padded_batch())
    trainer.save_checkpoint(root / "checkpoint")
    model.close()
    return root


# -- peft ----------------------------------------------------------------------------------------


def test_peft_adapter_of_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint/tokenizer_config.json").write_text("{}")
    export_peft(tmp_path / "checkpoint", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["inference_mode"] is True and settings["task_type"] == "CAUSAL_LM"
    assert settings["base_model_name_or_path"] == str(llama / "base")
    base = AutoModelForCausalLM.from_pretrained(llama / "base", attn_implementation="eager")
    bare = logits_of(base)
    plain = logits_of(PeftModel.from_pretrained(base, str(tmp_path / "out")).eval())
    with torch.no_grad():
        model = lema_model(llama / "base", lora_target_modules=TARGETS)
        model.lora_manager.load_pretrained(llama / "checkpoint")
        model.hf_model.eval()
        streamed = logits_of(model.hf_model)
        model.close()
    assert torch.equal(plain, streamed)
    assert not torch.allclose(plain, bare, atol=1e-3)


def test_peft_base_name_and_type(llama: Path, tmp_path: Path) -> None:
    make_adapter(llama / "base", tmp_path / "adapter")
    export_peft(tmp_path / "adapter", tmp_path / "out", base="someone/model", dtype="bfloat16")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "someone/model"
    assert "base_model: someone/model" in (tmp_path / "out/README.md").read_text()
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].bfloat16(), after[n]) for n in before)
    with pytest.raises(ConfigError, match="exists already"):
        export_peft(tmp_path / "adapter", tmp_path / "out")


# -- gguf ----------------------------------------------------------------------------------------


needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the gguf package")


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {n: f.contents() for n, f in reader.fields.items()}, {t.name: np.array(t.data) for t in reader.tensors}


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@needs_gguf
@pytest.mark.parametrize(
    ("family", "architecture", "lora"),
    [
        ("llama", "llama", {}),
        ("mistral", "llama", {}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
        ("llama", "llama", {"use_rslora": True}),
        ("llama", "llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}),
    ],
)
def test_gguf_changes_the_weights_as_peft_does(
    family: str, architecture: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    """What llama.cpp would add to its tensors, put back into transformers' order by transformers' own GGUF reader."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    save_tiny(family, tmp_path / "base")
    model = make_adapter(tmp_path / "base", tmp_path / "adapter", **lora)
    export_gguf(tmp_path / "adapter", tmp_path / "out.gguf")
    fields, tensors = read_gguf(tmp_path / "out.gguf")
    assert fields["general.architecture"] == architecture
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    config = model.config
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
        config={"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    )
    checked = 0
    for path, layer in model.base_model.model.named_modules():
        leaf = path.partition(".layers.")[2].partition(".")[2]
        if leaf not in NAMES:
            continue
        block = path.partition(".layers.")[2].partition(".")[0]
        name = f"blk.{block}.{NAMES[leaf]}.weight"
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        assert a.dtype == b.dtype == np.float32
        added = (b @ a) * (fields["adapter.lora.alpha"] / b.shape[1])  # llama.cpp: alpha / rank
        back = processor.process(weights=added, name=name).weights
        assert np.allclose(back, layer.get_delta_weight("default").detach().numpy(), atol=1e-6)
        checked += 1
    assert checked == 4 * len(NAMES) and not tensors


@needs_gguf
def test_gguf_of_a_plain_adapter_is_bit_exact_and_in_half(llama: Path, tmp_path: Path) -> None:
    export_gguf(llama / "checkpoint", tmp_path / "out.gguf")
    fields, tensors = read_gguf(tmp_path / "out.gguf")
    saved = load_file(llama / "checkpoint/adapter_model.safetensors")
    assert fields["adapter.lora.alpha"] == 8
    key = "base_model.model.model.layers.2.mlp.up_proj.lora_{}.weight"
    assert np.array_equal(tensors["blk.2.ffn_up.weight.lora_b"], saved[key.format("B")].numpy())
    assert np.array_equal(tensors["blk.2.ffn_up.weight.lora_a"], saved[key.format("A")].numpy())
    export_gguf(llama / "checkpoint", tmp_path / "half.gguf", dtype="float16")
    assert {t.dtype for t in read_gguf(tmp_path / "half.gguf")[1].values()} == {np.dtype("float16")}


@needs_gguf
def test_gguf_refusals(llama: Path, tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "gpt2")
    make_adapter(tmp_path / "gpt2", tmp_path / "a", targets="all-linear")
    with pytest.raises(UnsupportedError, match=r"'gpt2'.*llama, mistral"):
        export_gguf(tmp_path / "a", tmp_path / "out.gguf")
    make_adapter(llama / "base", tmp_path / "dora", use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA"):
        export_gguf(tmp_path / "dora", tmp_path / "out.gguf")
    (tmp_path / "there.gguf").write_bytes(b"")
    for name, dtype in (("there.gguf", "float32"), ("out.bin", "float32"), ("out.gguf", "bfloat16")):
        with pytest.raises(ConfigError):
            export_gguf(llama / "checkpoint", tmp_path / name, dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "dora", "gpt2", "there.gguf"]


# -- the check -----------------------------------------------------------------------------------


def levels(folder: Path) -> dict[str, set[str]]:
    """Levels of the findings by reader."""
    found = check_adapter(folder)
    assert all(finding.advice for finding in found if finding.level != "ok")
    return {reader: {f.level for f in found if f.reader == reader} for reader in READERS}


def test_a_clean_adapter_has_no_findings(llama: Path, tmp_path: Path) -> None:
    export_peft(llama / "checkpoint", tmp_path / "out", base="someone/model")
    assert levels(tmp_path / "out") == {reader: {"ok"} for reader in READERS}


@pytest.mark.parametrize(
    ("settings", "reader", "level", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "vLLM", "problem", "modules_to_save"),
        ({"modules_to_save": ["lm_head"]}, "llama.cpp", "problem", "whole"),
        ({"use_dora": True}, "vLLM", "problem", "DoRA"),
        ({"use_dora": True}, "llama.cpp", "problem", "DoRA"),
        ({"bias": "all"}, "vLLM", "problem", "bias"),
        ({"rank_pattern": {"q_proj": 64}}, "vLLM", "problem", "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 64}}, "llama.cpp", "warning", "alpha_pattern"),
        ({"use_rslora": True}, "llama.cpp", "warning", "rsLoRA"),
        ({"r": 64}, "vLLM", "warning", "max-lora-rank 64"),
        ({"r": 64}, "PEFT", "problem", "not of rank 64"),
        ({"base_model_name_or_path": None}, "PEFT", "warning", "base_model_name_or_path"),
        ({"base_model_name_or_path": "/elsewhere"}, "PEFT", "warning", "path"),
        ({"inference_mode": False}, "PEFT", "warning", "inference_mode"),
        ({"init_lora_weights": "pissa"}, "PEFT", "warning", "pissa"),
        ({"peft_type": "IA3"}, "PEFT", "problem", "IA3"),
        ({"target_modules": None}, "PEFT", "problem", "target_modules"),
        ({"target_parameters": ["x"]}, "llama.cpp", "problem", "target_parameters"),
    ],
)
def test_rules(settings: dict[str, Any], reader: str, level: str, words: str, llama: Path, tmp_path: Path) -> None:
    export_peft(llama / "checkpoint", tmp_path / "out", base="someone/model")
    edit(tmp_path / "out", **settings)
    assert level in levels(tmp_path / "out")[reader]
    assert [f for f in check_adapter(tmp_path / "out") if f.reader == reader and words in f.what + f.advice]


def test_rules_about_tensors(llama: Path, tmp_path: Path) -> None:
    export_peft(llama / "checkpoint", tmp_path / "out", base="someone/model")
    file = tmp_path / "out/adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_A" in name)

    def found(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, file)
        return " ".join(f.what for f in check_adapter(tmp_path / "out") if f.level != "ok")

    assert not found(tensors)
    assert "not finite" in found({**tensors, first: tensors[first] * math.nan})
    assert "zero in all" in found({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()})
    assert "lack A or B" in found({n: t for n, t in tensors.items() if n != first})
    assert "different rank" in found({**tensors, first: tensors[first][:2].clone()})
    assert "neither A, B" in found({**tensors, "lm_head.weight": torch.ones(2)})
    assert "of the base" in found({**tensors, "base_model.model.lm_head.weight": torch.ones(2)})
    file.write_bytes(file.read_bytes()[:-8])
    assert "problem" in levels(tmp_path / "out")["PEFT"]
    file.unlink()
    assert "problem" in levels(tmp_path / "out")["PEFT"]
    assert levels(tmp_path)["PEFT"] == {"problem"}


# -- the verbs -----------------------------------------------------------------------------------


def lema(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("verb", [["merge"], ["export"], ["adapter", "check"], ["adapter"]])
def test_help_has_an_example(verb: list[str]) -> None:
    shown = lema(*verb, "--help")
    assert shown.exit_code == 0 and "Example: lema" in shown.output


def test_merge_verb_on_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    done = lema("merge", llama / "checkpoint", tmp_path / "out", "--max-shard-size", "60KB")
    assert done.exit_code == 0, done.output
    assert "model-00001-of-0000" in done.output and "Verified on 32 tokens" in done.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    base = AutoModelForCausalLM.from_pretrained(llama / "base", attn_implementation="eager")
    apart = PeftModel.from_pretrained(base, str(llama / "checkpoint")).eval()
    assert torch.allclose(logits_of(merged), logits_of(apart), atol=2e-5)
    again = lema("merge", llama / "checkpoint", tmp_path / "out")
    assert again.exit_code == 1 and "exists already" in again.output
    assert lema("merge", llama / "checkpoint").exit_code == 2
    bad = lema("merge", llama / "checkpoint", tmp_path / "x", "--max-shard-size", "many")
    assert bad.exit_code == 2 and "max_shard_size" in bad.output


def test_merge_verb_with_the_base_given(llama: Path, tmp_path: Path) -> None:
    """The base has moved since training; the checkpoint's own note is wrong."""
    shutil.copytree(llama / "checkpoint", tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint/lema_config.json").read_text())
    config["model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "checkpoint/lema_config.json").write_text(json.dumps(config))
    lost = lema("merge", tmp_path / "checkpoint", tmp_path / "out")
    assert lost.exit_code == 1 and "gone" in lost.output
    given = lema("merge", tmp_path / "checkpoint", tmp_path / "out", "--base", llama / "base", "--no-verify")
    assert given.exit_code == 0 and "Not verified" in given.output
    file = lema(
        "merge", tmp_path / "checkpoint", tmp_path / "file", "--base", llama / "base/model.safetensors", "--no-verify"
    )
    assert file.exit_code == 0, file.output
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "file"))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_merge_verb_with_weights_apart(llama: Path, tmp_path: Path) -> None:
    """The architecture is where the checkpoint says; the weights are a file of their own."""
    shutil.copy(llama / "base/model.safetensors", tmp_path / "weights.safetensors")
    done = lema("merge", llama / "checkpoint", tmp_path / "out", "--base", tmp_path / "weights.safetensors")
    assert done.exit_code == 0 and "Verified" in done.output
    assert (tmp_path / "out/model.safetensors").is_file()


@needs_gguf
def test_export_verb(llama: Path, tmp_path: Path) -> None:
    made = lema("export", llama / "checkpoint", tmp_path / "peft")
    assert made.exit_code == 0 and "a path on this machine" in made.output
    made = lema("export", llama / "checkpoint", tmp_path / "hf", "--to", "hf")
    assert made.exit_code == 0 and (tmp_path / "hf/model.safetensors").is_file()
    made = lema("export", llama / "checkpoint", tmp_path / "a.gguf", "--to", "gguf-adapter")
    assert made.exit_code == 0 and (tmp_path / "a.gguf").is_file()
    assert lema("export", llama / "checkpoint", tmp_path / "x", "--to", "onnx").exit_code == 2
    with pytest.raises(CheckpointError):
        export_peft(tmp_path, tmp_path / "y")


def test_check_verb(llama: Path, tmp_path: Path) -> None:
    make_adapter(llama / "base", tmp_path / "dora", use_dora=True)
    bad = lema("adapter", "check", tmp_path / "dora")
    assert bad.exit_code == 1 and "DoRA is refused" in bad.output
    assert lema("adapter", "check", tmp_path / "dora", "--for", "peft").exit_code == 0
    listed = json.loads(lema("adapter", "check", tmp_path / "dora", "--json").output)
    assert {"reader", "level", "what", "advice"} == set(listed[0])
    assert lema("adapter", "check", llama / "checkpoint").exit_code == 0


def _without(folder: Path, name: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


def _as_pickle(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


FAULTS: dict[str, Callable[[Path], Any]] = {
    "none": lambda folder: None,
    "another rank": lambda folder: edit(folder, r=64),
    "another kind": lambda folder: edit(folder, peft_type="IA3"),
    "no targets": lambda folder: edit(folder, target_modules=None),
    "no alpha": lambda folder: _without(folder, "lora_alpha"),
    "cut": lambda folder: os.truncate(folder / "adapter_model.safetensors", 100),
    "empty": lambda folder: os.truncate(folder / "adapter_model.safetensors", 0),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "pickled only": _as_pickle,
    "pickled too": lambda folder: torch.save({}, folder / "adapter_model.bin"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_and_export_give_the_same_answer(fault: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    export_peft(llama / "checkpoint", folder, base="someone/model")
    FAULTS[fault](folder)
    checked, exported = lema("adapter", "check", folder, "--for", "peft"), lema("export", folder, tmp_path / "out")
    assert checked.exit_code == exported.exit_code == (0 if fault in ("none", "pickled too") else 1), exported.output
    found = [f for f in check_adapter(folder) if f.reader == "PEFT"]
    for advice in (*(f.advice for f in found), exported.output):  # it may be the only copy
        assert not re.search(r"\b(remove|delete|rm|unlink|overwrite)\b", advice), advice
