"""Merging: against PEFT's own merge, in every way an adapter and a base can be shaped, cut, stopped and sent away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lema.export.elements
import lema.export.lora_layers
import lema.export.merge
from bnb_files import plain_of
from families import save_tiny
from helpers import lema_model, padded_batch, plain_model, randomise
from hub_server import running_hub
from lema.cli.app import app
from lema.errors import CheckpointError, ConfigError, HubError, NonFiniteError, UnsupportedError, WeightsError
from lema.export.checkpoint import Checkpoint
from lema.export.merge import merge
from lema.export.verify import compare
from lema.export.weights import MergedWeights
from lema.prepare import prepare

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama, DoRA": ("llama", {}, {"use_dora": True}),
    "llama, rsLoRA and patterns": (
        "llama", {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    ),
    "llama, head": ("llama", {}, {"targets": ["q_proj", "lm_head"]}),
    "gpt2": ("gpt2", {}, {}),
    "gpt2, DoRA": ("gpt2", {}, {"use_dora": True}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "phi3": ("phi3", {}, {}),
    "gpt_neox": ("gpt_neox", {}, {}),
    "qwen3_moe": ("qwen3_moe", {}, {"targets": ["q_proj", "v_proj"]}),
    "qwen3_moe, experts": ("qwen3_moe", {}, {"targets": ["q_proj"], "target_parameters": EXPERTS}),
    "gpt_oss, experts": ("gpt_oss", {}, {"targets": ["q_proj"], "target_parameters": EXPERTS}),
}  # fmt: skip


def make_adapter(base: Path, folder: Path, targets: Any = "all-linear", **lora: Any) -> PeftModel:
    """An adapter with values that do something, saved by PEFT; returns PEFT's model with it."""
    model = plain_model(base, targets=targets, **lora).eval()
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    model.save_pretrained(str(folder))
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's directory."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base in several files and an adapter: `base`, `adapter`, and PEFT's merge in `peft`."""
    root = tmp_path_factory.mktemp("llama")
    model = save_tiny("llama", root / "base")
    model.save_pretrained(root / "base", max_shard_size="40KB")
    (root / "base/model.safetensors").unlink()
    (root / "base/tokenizer_config.json").write_text('{"model_max_length": 64}')
    (root / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    make_adapter(root / "base", root / "adapter").merge_and_unload().save_pretrained(root / "peft")
    return root


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge(case: str, tmp_path: Path) -> None:
    family, config, lora = CASES[case]
    save_tiny(family, tmp_path / "base", **config)
    model = make_adapter(tmp_path / "base", tmp_path / "adapter", **lora)
    unmerged = logits_of(model)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    result = merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    expected, found, base = (tensors_of(tmp_path / name) for name in ("peft", "merged", "base"))
    assert found.keys() == base.keys()
    assert not [n for n in expected if not torch.allclose(found[n], expected[n], rtol=0, atol=1e-6)]
    assert result.changed == sum(not torch.equal(found[n], base[n]) for n in base) > 0
    assert result.comparison is not None
    assert result.comparison.error < 1e-5 < 0.1 < result.comparison.effect
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert torch.allclose(logits_of(again), unmerged, rtol=0, atol=2e-5)


@pytest.mark.parametrize("run", [7, 100])
@pytest.mark.parametrize("case", ["llama, DoRA", "gpt2, DoRA", "qwen3_moe, experts", "gpt_oss, experts"])
def test_blocks_change_nothing(case: str, run: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, config, lora = CASES[case]
    save_tiny(family, tmp_path / "base", **config)
    make_adapter(tmp_path / "base", tmp_path / "adapter", **lora)
    merge(tmp_path / "adapter", tmp_path / "whole", base=tmp_path / "base", verify=False)
    monkeypatch.setattr(lema.export.elements, "RUN", run)
    monkeypatch.setattr(lema.export.lora_layers, "RUN", run)
    merge(tmp_path / "adapter", tmp_path / "blocks", base=tmp_path / "base", verify=False)
    whole, blocks = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "blocks")
    assert not [n for n in whole if not torch.allclose(whole[n], blocks[n], rtol=0, atol=1e-6)]


def test_keeps_the_bases_cut_and_surroundings(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int, str]] = []
    merge(
        llama / "adapter", tmp_path / "out", base=llama / "base", progress=lambda s, *more: seen.append((s.name, *more))
    )
    name = "model.safetensors.index.json"
    own, base = (json.loads((folder / name).read_text()) for folder in (tmp_path / "out", llama / "base"))
    assert own["weight_map"] == base["weight_map"]
    assert own["metadata"]["total_size"] == base["metadata"]["total_size"]
    files = sorted(set(own["weight_map"].values()))
    assert [name for name, *_ in seen] == files and {what for *_, what in seen} == {"merged"}
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (llama / "base/config.json").read_text()
    )
    assert (tmp_path / "out/tokenizer_config.json").read_text() == (llama / "base/tokenizer_config.json").read_text()
    assert (tmp_path / "out/generation_config.json").is_file()
    assert "license: apache-2.0" in (tmp_path / "out/README.md").read_text()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    found, expected = tensors_of(tmp_path / "out"), tensors_of(llama / "peft")
    assert not [n for n in expected if not torch.allclose(found[n], expected[n], rtol=0, atol=1e-6)]


def test_other_cuts(llama: Path, tmp_path: Path) -> None:
    one = merge(llama / "adapter", tmp_path / "one", base=llama / "base", single_file=True)
    few = merge(llama / "adapter", tmp_path / "few", base=llama / "base", max_shard_size=60_000)
    assert one.shards == ["model.safetensors"] and len(few.shards) > 1
    assert not (tmp_path / "one/model.safetensors.index.json").exists()
    for shard in few.shards:
        with safe_open(tmp_path / "few" / shard, "pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 60_000  # noqa: SIM118
    first, second = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "few")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    AutoModelForCausalLM.from_pretrained(tmp_path / "few")
    with pytest.raises(ConfigError, match="contradict"):
        merge(llama / "adapter", tmp_path / "x", base=llama / "base", single_file=True, max_shard_size=1)


def test_the_checkpoints_tokenizer_and_template_win(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/tokenizer_config.json").write_text('{"model_max_length": 7}')
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages }}")
    merge(tmp_path / "adapter", tmp_path / "out", base=llama / "base", verify=False)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"model_max_length": 7}
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"


def test_tied_embeddings_are_one_tensor_under_the_flag(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path / "base", tie_word_embeddings=True)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    weights = load_file(tmp_path / "base/model.safetensors")
    assert "lm_head.weight" not in weights
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(both, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert tensors_of(tmp_path / "out").keys() == weights.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.tie_word_embeddings
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, weights["model.embed_tokens.weight"])


def test_names_in_the_file_stay_as_they_are(tmp_path: Path) -> None:
    """GPT-2 of the hub has no `transformer.` in front, and mask buffers."""
    save_tiny("gpt2", tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "peft")
    weights = load_file(tmp_path / "base/model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    save_file(bare, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "peft")
    assert found.keys() == bare.keys()
    assert torch.equal(found["h.0.attn.bias"], bare["h.0.attn.bias"])
    name = "h.2.mlp.c_fc.weight"
    assert torch.allclose(found[name], expected[f"transformer.{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_in_float32_and_cast_once(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "base", tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors"):
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    result = merge(llama / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert result.comparison is not None and result.comparison.good
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    exact = PeftModel.from_pretrained(wide, str(llama / "adapter")).merge_and_unload().state_dict()
    found = tensors_of(tmp_path / "out")
    assert all(t.dtype == dtype for t in found.values())
    assert not [n for n, t in found.items() if not torch.equal(t, exact[n].to(dtype))]


def test_an_adapter_below_the_rounding_of_the_type_is_told_of(llama: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(llama / "adapter", tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    small = {n: t * 1e-6 if "lora_B" in n else t for n, t in weights.items()}
    save_file(small, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    found = {}
    for dtype in ("bfloat16", "float32"):
        options = [adapter, tmp_path / dtype, "--base", llama / "base", "--dtype", dtype]
        done = CliRunner().invoke(app, ["merge", *map(str, options)])
        assert done.exit_code == 0, done.output
        found[dtype] = done
    warning = "warning: the type written rounds the adapter away: only 0."
    assert warning in found["bfloat16"].stderr and "% of its effect on the logits is left" in found["bfloat16"].stderr
    assert not found["float32"].stderr
    assert "Verified on 32 tokens" in found["bfloat16"].stdout


def test_what_is_left_of_an_adapter_is_measured_against_its_effect(llama: Path, tmp_path: Path) -> None:
    whole = merge(llama / "adapter", tmp_path / "whole", base=llama / "base")
    assert whole.comparison is not None and whole.moved is not None
    assert whole.comparison.kept == pytest.approx(1, abs=1e-3) and whole.moved > 0.99 and whole.comparison.arrives
    lost = compare(Checkpoint.open(llama / "adapter", llama / "base"), llama / "base", torch.float32)
    assert lost.kept == pytest.approx(0, abs=1e-6) and not lost.arrives and not lost.good
    assert lost.error == lost.effect


def test_another_type(llama: Path, tmp_path: Path) -> None:
    merge(llama / "adapter", tmp_path / "out", base=llama / "base", dtype="bfloat16")
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_values_beyond_the_type_are_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({n: t * 3e3 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"q_proj|k_proj|proj.*bfloat16"):
        merge(tmp_path / "adapter", tmp_path / "out", base=llama / "base", dtype="float16")
    save_file({n: t * float("nan") for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="not finite"):
        merge(tmp_path / "adapter", tmp_path / "out", base=llama / "base")
    assert not (tmp_path / "out").exists()


# -- refused by name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_refused_settings(settings: dict[str, Any], words: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(UnsupportedError, match=words):
        merge(tmp_path / "adapter", tmp_path / "out", base=llama / "base")


def test_refused_embedding_and_tied_head(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    for name, targets in (("embedding", ["embed_tokens"]), ("head", ["lm_head"])):
        make_adapter(tmp_path / "base", tmp_path / name, targets=targets)
        with pytest.raises(UnsupportedError, match=r"embed_tokens|lm_head.*ties"):
            merge(tmp_path / name, tmp_path / "out", base=tmp_path / "base")


def test_refused_quantised_base(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedError, match="fp8"):
        merge(llama / "adapter", tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize("case", ["llama", "qwen3_moe, experts"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_of_codes_is_merged_as_what_they_stand_for(case: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    family, config, lora = CASES[case]
    save_tiny(family, tmp_path / "source", **config)
    codes = prepare(tmp_path / "source", tmp_path / "codes", quantize=kind).path
    model = make_adapter(plain_of(codes, tmp_path / "plain"), tmp_path / "adapter", **lora)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    result = merge(tmp_path / "adapter", tmp_path / "merged", base=codes)
    expected, found, plain = (tensors_of(tmp_path / name) for name in ("peft", "merged", "plain"))
    assert found.keys() == plain.keys() and "quantization_config" not in (tmp_path / "merged/config.json").read_text()
    assert not [n for n in expected if not torch.allclose(found[n], expected[n], rtol=0, atol=1e-6)]
    assert result.changed == sum(not torch.equal(found[n], plain[n]) for n in plain) > 0
    assert result.comparison is not None and result.comparison.error < 1e-5
    half = merge(tmp_path / "adapter", tmp_path / "half", base=codes, dtype="bfloat16", verify=False)
    assert half.nbytes < 0.51 * result.nbytes
    assert all(torch.equal(tensor, found[n].bfloat16()) for n, tensor in tensors_of(tmp_path / "half").items())
    again = merge(tmp_path / "adapter", tmp_path / "again", base=codes, quantize=kind, verify=False)
    assert not list(tmp_path.glob(".again*"))
    assert again.errors.keys() == prepare(tmp_path / "source", tmp_path / "other", quantize=kind).errors.keys()
    assert 0 < max(again.errors.values()) < 0.13
    with lema_model(tmp_path / "again", use_lora=False) as streamed:
        assert torch.isfinite(logits_of(streamed.hf_model)).all()


def test_an_adapter_of_another_model(llama: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "wide", hidden_size=64)
    with pytest.raises(CheckpointError, match="does not fit"):
        merge(llama / "adapter", tmp_path / "out", base=tmp_path / "wide")
    save_tiny("gpt2", tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="does not fit"):
        merge(llama / "adapter", tmp_path / "out", base=tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r"adapter_config.json.*there are .*adapter"):
        merge(llama, tmp_path / "out", base=llama / "base")


def test_a_base_that_is_not_the_one_trained_on(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with lema_model(llama / "base") as model:
        trainer = model.get_trainer()
        trainer.train_step(padded_batch())
        trainer.save_checkpoint(tmp_path / "checkpoint")
    merge(tmp_path / "checkpoint", tmp_path / "right")
    other = save_tiny("llama", tmp_path / "other", seed=9)
    other.save_pretrained(tmp_path / "other", max_shard_size="40KB")
    (tmp_path / "other/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="was trained on other base weights"):
        merge(tmp_path / "checkpoint", tmp_path / "wrong", base=tmp_path / "other")
    assert not (tmp_path / "wrong").exists()
    AutoModelForCausalLM.from_pretrained(llama / "base").save_pretrained(tmp_path / "whole")
    merge(tmp_path / "checkpoint", tmp_path / "cut", base=tmp_path / "whole")
    assert "whether these are the same weights cannot be told" in caplog.text


# -- room, names, interruption -------------------------------------------------------------------


def test_too_little_room(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(lema.export.merge.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(WeightsError, match=r"KB together are .*1 KB free"):
        merge(llama / "adapter", tmp_path / "out", base=llama / "base")
    assert not (tmp_path / "out").exists()


def test_an_output_with_something_in_it(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(llama / "adapter", tmp_path / "out", base=llama / "base", verify=False)
    with pytest.raises(ConfigError, match="exists already"):
        merge(llama / "adapter", tmp_path / "out", base=llama / "base")


def test_stopped_and_continued(llama: Path, tmp_path: Path) -> None:
    def stop(shard: Any, number: int, total: int, state: str) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(llama / "adapter", tmp_path / "out", base=llama / "base", progress=stop)
    assert not (tmp_path / "out").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert len(kept) == 3
    (tmp_path / ".out.partial/.model-00004-of-x.safetensors.1.ab.tmp").write_bytes(b"a writer that was killed")
    states: list[str] = []
    merge(llama / "adapter", tmp_path / "out", base=llama / "base", progress=lambda *seen: states.append(seen[3]))
    assert states[:3] == ["kept"] * 3 and set(states[3:]) == {"merged"}
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in kept} == kept
    found, expected = tensors_of(tmp_path / "out"), tensors_of(llama / "peft")
    assert not [n for n in expected if not torch.allclose(found[n], expected[n], rtol=0, atol=1e-6)]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_adapter_begins_anew(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "adapter", tmp_path / "adapter")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "adapter", tmp_path / "out", base=llama / "base", progress=stop)
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({n: t * 2 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    states: list[str] = []
    merge(tmp_path / "adapter", tmp_path / "out", base=llama / "base", progress=lambda *seen: states.append(seen[3]))
    assert set(states) == {"merged"}


def test_two_at_once(llama: Path, tmp_path: Path) -> None:
    def second(*_: Any) -> None:
        with pytest.raises(ConfigError, match="another process"):
            merge(llama / "adapter", tmp_path / "out", base=llama / "base")

    merge(llama / "adapter", tmp_path / "out", base=llama / "base", progress=second, verify=False)


def test_verification_finds_wrong_weights(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MergedWeights.parts
    monkeypatch.setattr(MergedWeights, "parts", lambda *given: (part * 1.01 for part in right(*given)))
    with pytest.raises(WeightsError, match="was not made"):
        merge(llama / "adapter", tmp_path / "out", base=llama / "base")
    assert not (tmp_path / "out").exists()
    merge(llama / "adapter", tmp_path / "out", base=llama / "base", verify=False)
    assert (tmp_path / "out").exists()


_MERGE = "import sys; from lema.export.merge import merge; merge(*sys.argv[1:3], base=sys.argv[3], verify=False)"


@pytest.mark.slow
def test_killed_and_continued(llama: Path, tmp_path: Path) -> None:
    """SIGKILL at many moments; in the end the same bytes as never killed."""
    arguments = [str(llama / "adapter"), str(tmp_path / "out"), str(llama / "base")]
    merge(llama / "adapter", tmp_path / "whole", base=llama / "base", verify=False)
    kills = 0
    for moment in range(12):
        process = subprocess.Popen([sys.executable, "-c", _MERGE, *arguments])
        partial, wanted = tmp_path / ".out.partial", moment % 6
        while process.poll() is None and len(list(partial.glob("model-*.safetensors"))) < wanted:
            time.sleep(0.001)
        time.sleep(0.002 * moment)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists():  # whole, as the end of the test says, even where the kill came right after
            break
    assert kills
    if not (tmp_path / "out").exists():
        subprocess.run([sys.executable, "-c", _MERGE, *arguments], check=True)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


_MEASURE = """
import resource, sys
import transformers.models.llama.modeling_llama
from lema.export.merge import merge
floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(sys.argv[1], sys.argv[2], base=sys.argv[3], verify=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - floor) * 1024)
"""


@pytest.mark.slow
def test_memory_stays_below_one_and_a_half_layers(tmp_path: Path) -> None:
    config = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000, "tie_word_embeddings": True}
    model = save_tiny("llama", tmp_path / "base", num_hidden_layers=6, num_attention_heads=8, **config)
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    del model
    arguments = [tmp_path / "adapter", tmp_path / "out", tmp_path / "base"]
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout
    assert int(output.split()[-1]) < 1.5 * layer


# -- to the hub ----------------------------------------------------------------------------------


def test_upload(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []

    def count(*_: Any) -> None:
        most.append(len(list((tmp_path / ".out.partial").glob("*.safetensors"))))

    with running_hub(monkeypatch) as hub:
        result = merge(llama / "adapter", tmp_path / "out", base=llama / "base", upload="me/repo", progress=count)
        (tmp_path / "again").mkdir()
        for name, content in hub.files.items():
            (tmp_path / "again" / name).write_bytes(content)
    assert max(most) == 0 and len(most) == len(result.shards) > 1
    assert hub.commits[:-1] == [[name] for name in result.shards]
    assert not list((tmp_path / "out").glob("*.safetensors"))
    listed = json.loads((tmp_path / "out/uploaded.json").read_text())
    assert listed["repo"] == "me/repo" and sorted(listed["files"]) == sorted(result.shards)
    found, expected = tensors_of(tmp_path / "again"), tensors_of(llama / "peft")
    assert not [n for n in expected if not torch.allclose(found[n], expected[n], rtol=0, atol=1e-6)]
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("step", "failures"),
    [
        ("put", [403]),
        ("put", [500] * 9),
        ("put", ["drop"] * 9),
        ("batch", [401]),
        ("preupload", ["drop"] * 9),
        ("commit", [500] * 9),
        ("commit", ["drop"] * 9),
        ("paths", [500] * 9),
        ("checksum", ["lie"]),
    ],
)
def test_a_failed_upload_keeps_the_file_and_goes_on(
    step: str, failures: list[Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_it(shard: Any, number: int, total: int, state: str) -> None:
        if number == 1:
            hub.failures[step] = list(failures)

    with running_hub(monkeypatch) as hub:
        with pytest.raises(HubError, match=r"still here"):
            merge(llama / "adapter", tmp_path / "out", base=llama / "base", upload="me/repo", progress=break_it)
        left = list((tmp_path / ".out.partial").glob("*.safetensors"))
        assert len(left) == 1 and not (tmp_path / "out").exists()
        stamp = left[0].stat().st_mtime_ns
        hub.failures.clear()
        states: list[str] = []

        def watch(shard: Any, number: int, total: int, state: str) -> None:
            states.append(state)

        monkeypatch.setattr(MergedWeights, "parts", _only_other(left[0].name, llama, stamp))
        merge(llama / "adapter", tmp_path / "out", base=llama / "base", upload="me/repo", progress=watch)
    assert states[0] == "uploaded before" and set(states[1:]) == {"uploaded"}
    assert not list((tmp_path / "out").glob("*.safetensors"))


def _only_other(name: str, llama: Path, stamp: int) -> Any:
    """`MergedWeights.parts` that fails for tensors of a file that is finished."""
    index = json.loads((llama / "base/model.safetensors.index.json").read_text())["weight_map"]
    right = MergedWeights.parts

    def parts(self: MergedWeights, record: Any, dtype: torch.dtype) -> Any:
        assert index[record.name] != name, f"{name} was finished and is made again"
        return right(self, record, dtype)

    return parts


def test_weights_that_are_there_are_not_mixed_with_new_ones(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = ["model-00009-of-00009.safetensors", "pytorch_model.bin.index.json", "adapter_config.json"]
    options: dict[str, Any] = {"base": llama / "base", "upload": "me/repo"}
    with running_hub(monkeypatch) as hub:
        hub.files |= dict.fromkeys([*stale, "README.md", "training_args.bin", "other/model.safetensors"], b"old")
        with pytest.raises(ConfigError, match=r"me/repo has weights already: adapter_config\.json.*--overwrite"):
            merge(llama / "adapter", tmp_path / "out", **options)
        assert not hub.commits and not list((tmp_path / ".out.partial").glob("*.safetensors"))
        hub.failures["put"] = [403]
        with pytest.raises(HubError, match="still here"):
            merge(llama / "adapter", tmp_path / "out", overwrite=True, **options)
        result = merge(llama / "adapter", tmp_path / "out", **options)  # goes on with what was asked for then
        assert set(stale) & {*hub.files} == set()
        assert {*stale, "config.json"} <= {*hub.commits[-1]}, "in the commit that completes the model"
        assert {*result.shards, "training_args.bin", "other/model.safetensors"} <= {*hub.files}
        assert hub.files["README.md"] != b"old"
        with pytest.raises(ConfigError, match="has weights already"):
            merge(llama / "adapter", tmp_path / "second", **options)


def test_a_chat_template_alone_is_no_tokenizer(llama: Path, tmp_path: Path) -> None:
    base, adapter = (Path(shutil.copytree(llama / name, tmp_path / name)) for name in ("base", "adapter"))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (base / "chat_template.jinja").write_text("{{ other }}")
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    merge(adapter, tmp_path / "merged", base=base, verify=False)
    assert (tmp_path / "merged/chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "merged/additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    assert (tmp_path / "merged/tokenizer_config.json").read_text() == '{"model_max_length": 64}'


@pytest.mark.slow
def test_upload_from_the_command_line(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint from the environment; a refused file first, and the same command again."""
    command = [
        sys.executable, "-m", "lema", "merge", llama / "adapter", tmp_path / "out", "--base", llama / "base",
        "--upload", "me/repo",
    ]  # fmt: skip
    with running_hub(monkeypatch) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        hub.failures["put"] = [403]
        refused = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert refused.returncode == 1 and "still here" in refused.stderr and "Traceback" not in refused.stderr
        assert "goes on from there" in refused.stderr
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "confirmed by its sha256" in done.stdout
    assert {name for name in hub.files if name.endswith(".safetensors")} == hub.large
    assert {"config.json", "README.md", "model.safetensors.index.json", "tokenizer_config.json"} <= hub.files.keys()


def test_a_repository_that_may_not_be_written_fails_before_any_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(monkeypatch) as hub:
        hub.failures["create"] = [401]
        with pytest.raises(HubError, match="hf auth login"):
            merge(llama / "adapter", tmp_path / "out", base=llama / "base", upload="me/repo")
    assert not list((tmp_path / ".out.partial").glob("*.safetensors"))
