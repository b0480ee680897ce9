"""`lema prepare --quantize`: bitsandbytes' own codes, loaded by transformers, taken up again, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import create_dynamic_map, int8_vectorwise_quant, quantize_4bit

from families import save_tiny
from lema.cli.app import app
from lema.errors import ConfigError, UnsupportedError, WeightsError
from lema.models.registry import get_adapter
from lema.prepare import prepare
from lema.prepare.encoders import ENCODERS, dynamic_map
from lema.storage.codecs.bitsandbytes import Bitsandbytes
from lema.storage.codecs.formats import find_stored
from lema.storage.index import GlobalBinaryIndex
from lema.storage.layout import ParameterSource, SlotLayout
from lema.storage.views import materialize


def test_the_dynamic_map_is_the_librarys() -> None:
    assert torch.equal(dynamic_map(), create_dynamic_map())


@pytest.mark.parametrize("shape", [(128, 192), (64, 64), (3, 50), (1, 63), (5, 7)])
def test_four_bits_are_the_librarys_codes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).bfloat16()
    weight[0, :5] = 0
    cut = weight.numel() // 3
    pieces = [weight.view(-1)[:cut], weight.view(-1)[cut:]]
    found = ENCODERS["nf4"].encode("w", shape, torch.bfloat16, pieces)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected = {f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()} | {"w": codes}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" in name:
            assert json.loads(bytes(found[name].numpy())) == json.loads(bytes(tensor.numpy()))
        else:
            # of a block whose scales are all the same nothing is left to scale, and any code will do
            any_code = name == "w.absmax" and not bool(expected["w.nested_absmax"].any())
            assert any_code or torch.equal(found[name], tensor), name
    declared = {name: (dtype, size) for name, dtype, size in ENCODERS["nf4"].declared("w", shape)}
    assert declared == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}


def test_eight_bits_are_the_librarys_codes() -> None:
    weight = torch.randn(70, 33, generator=torch.Generator().manual_seed(1)).half()
    codes, scales, _ = int8_vectorwise_quant(weight.clone())
    found = ENCODERS["int8"].encode("a.weight", (70, 33), torch.float16, [weight.view(-1)[:50], weight.view(-1)[50:]])
    assert torch.equal(found["a.SCB"], scales) and found["a.weight_format"].item() == 0
    # the library divides in float16, which rounds a code in many to its neighbour
    assert int((found["a.weight"].int() - codes.int()).abs().max()) <= 1
    zeros = ENCODERS["int8"].encode("a.weight", (2, 3), torch.float16, [torch.zeros(6)])
    assert not bool(zeros["a.weight"].any())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transformers_loads_it_and_says_the_same(tmp_path: Path, kind: str) -> None:
    save_tiny("llama", tmp_path / "source", hidden_size=64, intermediate_size=96)
    made = prepare(tmp_path / "source", tmp_path / "codes", dtype="bfloat16", quantize=kind)
    assert made.written and len(made.errors) == 4 * 7
    assert all(0.0 < error < (0.12 if kind == "nf4" else 0.02) for error in made.errors.values())
    loaded, info = AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = dict(loaded.dequantize(dtype=torch.bfloat16).state_dict())
    with GlobalBinaryIndex(made.path) as gbi:
        stored = Bitsandbytes().find({name: gbi.record(name) for name in gbi.keys}, None)
        assert stored.keys() == made.errors.keys()
        for name, one in stored.items():
            assert torch.equal(
                found[name], materialize(gbi, ParameterSource(name, one.shape, torch.bfloat16, one.codec))
            )
        adapter = get_adapter("llama", json.loads((made.path / "config.json").read_text()))
        for sources in adapter.unit_sources(gbi):
            assert len(SlotLayout(sources).extents) <= 3, "one for each size of item, tables between codes among them"
    source = load_file(tmp_path / "source" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], source[name].bfloat16()), f"{name} is left as it is"


def test_transformers_decodes_fp8_to_the_same(tmp_path: Path) -> None:
    """On a CPU its loader makes values of the codes; it takes whole blocks only."""
    save_tiny("llama", tmp_path / "source", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    made = prepare(tmp_path / "source", tmp_path / "codes", dtype="bfloat16", quantize="fp8")
    assert len(made.errors) == 4 * 7 and all(0.0 < error < 0.04 for error in made.errors.values())
    found = dict(AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.bfloat16).state_dict())
    with GlobalBinaryIndex(made.path) as gbi:
        stored = find_stored({name: gbi.record(name) for name in gbi.keys}, None)
        assert stored.keys() == made.errors.keys()
        for name, one in stored.items():
            ours = materialize(gbi, ParameterSource(name, one.shape, torch.bfloat16, one.codec))
            assert torch.equal(found[name], ours), name


def test_head_and_embedding_where_they_are_asked_for(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "source")
    made = prepare(tmp_path / "source", tmp_path / "codes", quantize="int8", quantize_also=["head", "router"])
    assert "lm_head.weight" in made.errors and "model.embed_tokens.weight" not in made.errors
    assert {"model.layers.0.mlp.gate.weight", "model.layers.3.mlp.experts.3.up_proj.weight"} <= made.errors.keys()
    skipped = json.loads((made.path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == []


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "source")
    expected = prepare(tmp_path / "source", tmp_path / "whole", quantize="nf4")

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "writing" and done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("lema.prepare.job._SYNC_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "source", tmp_path / "codes", quantize="nf4", progress=stop)
    made = prepare(tmp_path / "source", tmp_path / "codes", quantize="nf4")
    assert made.kept > 10
    assert made.errors == expected.errors
    assert load_file(made.path / "model.safetensors").keys() == load_file(expected.path / "model.safetensors").keys()
    assert (made.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    with pytest.raises(ConfigError, match="quantize='int4' is none of nf4, int8, fp8"):
        prepare(tmp_path / "source", tmp_path / "codes", quantize="int4")
    with pytest.raises(ConfigError, match="quantize_also='norm' is none of router, embedding, head"):
        prepare(tmp_path / "source", tmp_path / "codes", quantize="nf4", quantize_also=["norm"])
    codes = prepare(tmp_path / "source", tmp_path / "codes", quantize="nf4").path
    with pytest.raises(UnsupportedError, match="quantised with bitsandbytes"):
        prepare(codes, tmp_path / "again", quantize="int8")
    save_tiny("gpt2", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="has no matrices"):
        prepare(tmp_path / "gpt2", tmp_path / "none", quantize="nf4")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.up_proj"):
        prepare(tmp_path / "source", tmp_path / "broken", quantize="nf4")
    assert not (tmp_path / "broken").exists()


def test_the_command_says_how_far_off_it_is(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    words = ["prepare", str(tmp_path / "source"), str(tmp_path / "codes"), "--quantize", "nf4"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "28 tensors are codes now: off by " in result.output
    words[2] = str(tmp_path / "other")
    listed: dict[str, Any] = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert len(listed["errors"]) == 28
    refused = CliRunner().invoke(app, [*words[:-1], "q4"])
    assert refused.exit_code == 2 and "--quantize" in refused.output
