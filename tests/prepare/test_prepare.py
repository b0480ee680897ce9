"""`lema prepare`: every source there is, made into a folder that plain transformers and LEMA load; and hostile ones."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from gguf_files import LLAMA_FIELDS, llama_tensors, needs_smollm2, write_gguf
from lema.cli.app import app
from lema.errors import (
    ConfigError,
    LemaError,
    MissingTensorError,
    ReadError,
    ShapeMismatchError,
    UnsupportedError,
    WeightsError,
    WeightsFormatError,
    WeightsNotFoundError,
)
from lema.prepare import locate, prepare
from lema.prepare.demo_model import locate_smollm2, smollm2_folder
from lema.storage.index import GlobalBinaryIndex

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the gguf package")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def tiny(tie: bool = False, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tie,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**values, **settings}))


def write_companions(folder: Path, model: LlamaForCausalLM) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text("for people")
    return folder


@pytest.fixture
def torch_folder(tmp_path: Path) -> Path:
    model = tiny()
    folder = write_companions(tmp_path / "torch", model)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = write_companions(tmp_path / "sharded", tiny())
    tiny().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def split_torch(folder: Path, **changes: Any) -> Path:
    """A sharded torch checkpoint with its index."""
    model = tiny()
    write_companions(folder, model)
    weights = list(model.state_dict().items())
    halves = [dict(weights[:9]), dict(weights[9:])]
    names = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
    for name, half in zip(names, halves):
        torch.save(half, folder / name)
    weight_map = {tensor: name for name, half in zip(names, halves) for tensor in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {**weight_map, **changes}}))
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(folder: Path, model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> None:
    """Plain transformers loads the folder as this model, without a word of missing or unexpected tensors."""
    read, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    found = read.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor.to(dtype)) for name, tensor in expected.items())


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bf16", "float16"])
def test_bin_becomes_a_folder(tmp_path: Path, torch_folder: Path, dtype: str | None) -> None:
    prepared = prepare(torch_folder, tmp_path / "out", dtype=dtype, max_shard_size="30KB")
    wanted = {None: torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}[dtype]
    assert prepared.written and prepared.files > 1 and prepared.tensors == 30 and prepared.kept == 0
    same(prepared.path, tiny(), wanted)
    config = json.loads((prepared.path / "config.json").read_text())
    assert config["dtype"] == str(wanted).removeprefix("torch.") and "torch_dtype" not in config
    assert (prepared.path / "chat_template.jinja").read_text() == TEMPLATE
    names = left(prepared.path)
    assert "generation_config.json" in names and "README.md" not in names
    assert left(tmp_path) == ["out", "torch"]
    with GlobalBinaryIndex(prepared.path) as index:
        assert all(min(index.record(n).offset for n in index.keys if index.record(n).file == f) % 4096 == 0
                   for f in index.files)  # fmt: skip


def test_layers_are_not_torn_apart(tmp_path: Path, torch_folder: Path) -> None:
    prepared = prepare(torch_folder, tmp_path / "out", max_shard_size="31KB")
    files = {re.sub(r"(layers\.\d+).*", r"\1", name): set() for name in loaded(prepared.path)}
    with GlobalBinaryIndex(prepared.path) as index:
        for name in index.keys:
            files[re.sub(r"(layers\.\d+).*", r"\1", name)].add(index.record(name).file)
    assert all(len(where) == 1 for where in files.values()) and len(files) == 6


def test_sharded_bin_and_one_file(tmp_path: Path) -> None:
    prepared = prepare(split_torch(tmp_path / "in"), tmp_path / "out", monolithic=True)
    assert prepared.files == 1 and "model.safetensors" in left(prepared.path)
    same(prepared.path, tiny())


def test_what_streams_already_is_left_alone(tmp_path: Path, sharded: Path) -> None:
    before = left(sharded)
    prepared = prepare(sharded)
    assert not prepared.written and prepared.path == sharded and prepared.tensors == 30
    assert prepare(sharded, tmp_path / "out", dtype="float32").written is False
    assert left(sharded) == before and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="name an output folder"):
        prepare(sharded, dtype="bfloat16")
    same(prepare(sharded, tmp_path / "bf16", dtype="bfloat16").path, tiny(), torch.bfloat16)
    one = prepare(sharded, tmp_path / "one", monolithic=True)
    assert one.written and one.files == 1
    assert prepare(tmp_path / "one", monolithic=True).written is False


def test_wrapped_transposed_and_old_checkpoints(tmp_path: Path) -> None:
    model = tiny()
    folder = write_companions(tmp_path / "in", model)
    weights = {n: t.mT.contiguous().mT if t.ndim == 2 else t for n, t in model.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, folder / "last.pt")
    same(prepare(folder, tmp_path / "wrapped").path, model)
    torch.save(model.state_dict(), folder / "last.pt", _use_new_zipfile_serialization=False)
    old = prepare(folder / "last.pt", tmp_path / "old")
    same(old.path, model)
    assert "had to be read whole" in old.notes[0]


def test_configuration_from_elsewhere(tmp_path: Path, torch_folder: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.move(torch_folder / "pytorch_model.bin", bare / "weights.pt")
    with pytest.raises(ConfigError, match=r"nothing says what model weights\.pt is.*--config"):
        prepare(bare / "weights.pt", tmp_path / "out")
    same(prepare(bare / "weights.pt", tmp_path / "out", config=str(torch_folder)).path, tiny())


@needs_gguf
@pytest.mark.parametrize("quantise", [True, False])
def test_gguf(tmp_path: Path, quantise: bool) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    companions = write_companions(tmp_path / "config", LlamaForCausalLM(config))
    source = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(), quantise, **LLAMA_FIELDS)
    prepared = prepare(source, tmp_path / "out", config=str(companions))
    wanted = torch.float16 if quantise else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    reference = load_gguf_checkpoint(source, return_tensors=True, model_to_load=model)["tensors"]
    written = loaded(prepared.path)
    assert written.keys() == reference.keys()
    assert all(written[name].equal(reference[name].to(wanted)) for name in written)
    assert json.loads((prepared.path / "config.json").read_text())["tie_word_embeddings"] is True


# --- ties and types -------------------------------------------------------------------------------


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = tiny(tie=True)
    folder = write_companions(tmp_path / "in", model)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "lm_head.weight" in torch.load(folder / "pytorch_model.bin")
    prepared = prepare(folder, tmp_path / "out")
    assert "lm_head.weight" not in loaded(prepared.path) and "one copy" in prepared.notes[0]
    assert json.loads((prepared.path / "config.json").read_text())["tie_word_embeddings"] is True
    same(prepared.path, model)


def test_a_flag_the_weights_contradict_is_corrected(tmp_path: Path) -> None:
    model = tiny()
    folder = write_companions(tmp_path / "in", model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    prepared = prepare(folder, tmp_path / "out")
    assert prepared.written and "tie_word_embeddings is false now" in prepared.notes[0]
    assert json.loads((prepared.path / "config.json").read_text())["tie_word_embeddings"] is False
    same(prepared.path, model)


def test_an_untied_head_that_is_missing_is_an_error(tmp_path: Path) -> None:
    model = tiny()
    folder = write_companions(tmp_path / "in", model)
    torch.save({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}, folder / "pytorch_model.bin")
    with pytest.raises(MissingTensorError, match="lm_head"):
        prepare(folder, tmp_path / "out")
    assert left(tmp_path) == ["in"]


def test_values_too_large_are_reported_also_after_a_restart(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, :3] = 1e6
    folder = write_companions(tmp_path / "in", model)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out", dtype="float16", max_shard_size="20KB", progress=Stop(25))
    prepared = prepare(folder, tmp_path / "out", dtype="float16", max_shard_size="20KB")
    assert prepared.overflowed == {"model.embed_tokens.weight": 3} and prepared.kept > 0
    assert prepare(folder, tmp_path / "bf16", dtype="bfloat16").overflowed == {}


# --- interrupted ----------------------------------------------------------------------------------


class Stop:
    """A progress callback that interrupts at its nth call, and remembers how often each phase called."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.calls, self.phases = at, 0, dict[str, int]()

    def __call__(self, phase: str, done: int, total: int) -> None:
        assert 0 < done <= total
        self.calls += 1
        self.phases[phase] = self.phases.get(phase, 0) + 1
        if self.calls == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lema.prepare.job._SYNC_BYTES", 1)  # every tensor is noted
    whole = prepare(torch_folder, tmp_path / "whole", max_shard_size="30KB")
    reference = {path.name: path.read_bytes() for path in whole.path.iterdir()}
    for at in (1, 2, 17, 30, 31, 59, 60):
        target = tmp_path / f"out{at}"
        with pytest.raises(KeyboardInterrupt):
            prepare(torch_folder, target, max_shard_size="30KB", progress=Stop(at))
        assert not target.exists()
        again = Stop()
        prepared = prepare(torch_folder, target, max_shard_size="30KB", progress=again)
        assert prepared.kept == min(at - 1, 30)
        assert again.phases.get("writing", 0) == 30 - prepared.kept  # not written again
        assert again.phases.get("verifying what is there", 0) == prepared.kept
        assert {path.name: path.read_bytes() for path in target.iterdir()} == reference
    assert left(tmp_path) == [*sorted(f"out{at}" for at in (1, 2, 17, 30, 31, 59, 60)), "torch", "whole"]


def test_what_is_kept_is_verified(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lema.prepare.job._SYNC_BYTES", 1)
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(torch_folder, target, progress=Stop(31))
    work = tmp_path / ".out.prepare"
    file = work / "output" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with open(work / "done.jsonl", "a") as journal:
        journal.write('["model.norm.wei')  # a line cut short
    prepared = prepare(torch_folder, target)
    assert prepared.kept == 29
    same(target, tiny())


def test_another_job_starts_anew(tmp_path: Path, torch_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(torch_folder, target, dtype="float16", max_shard_size="20KB", progress=Stop(29))
    prepared = prepare(torch_folder, target, dtype="bfloat16", max_shard_size="20KB")
    assert prepared.kept == 0 and "starting anew" in caplog.text
    same(target, tiny(), torch.bfloat16)


def test_two_at_once(tmp_path: Path, torch_folder: Path) -> None:
    def second(phase: str, done: int, total: int) -> None:
        with pytest.raises(ConfigError, match="another process is preparing it"):
            prepare(torch_folder, tmp_path / "out")

    assert prepare(torch_folder, tmp_path / "out", progress=second).written


def test_a_full_disk_keeps_what_is_written(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lema.prepare.job._SYNC_BYTES", 1)
    room, pwrite = [60_000], os.pwrite

    def limited(descriptor: int, data: Any, offset: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        with pytest.raises(WeightsError, match=r"No space left on device.*run the same command again"):
            prepare(torch_folder, tmp_path / "out")
    prepared = prepare(torch_folder, tmp_path / "out")
    assert prepared.kept > 5
    same(prepared.path, tiny())


def test_space_is_checked_first(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(WeightsError, match=r"needs 67\.\d MB \(672\d+ bytes\), and its disk has 5 KB \(5000 bytes\)"):
        prepare(torch_folder, tmp_path / "out")
    assert left(tmp_path) == ["torch"]


def test_a_disk_that_lies_is_found_out(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lema.prepare.job._SYNC_BYTES", 1)
    spoiled: list[Path] = []

    def spoil(phase: str, done: int, total: int) -> None:
        if phase == "verifying" and not spoiled:
            file = next((tmp_path / ".out.prepare" / "output").glob("*.safetensors"))
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
            spoiled.append(file)

    with pytest.raises(WeightsError, match="reads back differently"):
        prepare(torch_folder, tmp_path / "out", progress=spoil)
    assert not (tmp_path / "out").exists()


def test_targets_in_the_way(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for target in (torch_folder, tmp_path / "file"):
        with pytest.raises(ConfigError, match="exists already"):
            prepare(torch_folder, target)
    (tmp_path / "empty").mkdir()
    same(prepare(torch_folder, tmp_path / "empty").path, tiny())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(WeightsError, match="cannot be written"):
        prepare(torch_folder, "/proc/lema/out")


def test_a_source_that_changes_meanwhile(tmp_path: Path, torch_folder: Path) -> None:
    def touch(phase: str, done: int, total: int) -> None:
        if done == total:
            os.utime(torch_folder / "pytorch_model.bin", (1, 1))

    with pytest.raises(WeightsError, match="changed while it was read"):
        prepare(torch_folder, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


# --- hostile sources ------------------------------------------------------------------------------


class Evil:
    """Runs a command when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['LEMA_EVIL']}",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMA_EVIL", str(tmp_path / "ran"))
    for zipped in (True, False):
        torch.save({"w": torch.ones(2), "x": Evil()}, torch_folder / "pytorch_model.bin",
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        with pytest.raises(UnsupportedError, match=r"holds Python objects beside tensors \(posix\.system\)"):
            prepare(torch_folder, tmp_path / "out")
    assert left(tmp_path) == ["torch"]


def test_truncated_at_any_length(tmp_path: Path, torch_folder: Path) -> None:
    file = torch_folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for length in (0, 1, 4, 100, 5000, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(WeightsFormatError, match=r"is damaged|no PyTorch checkpoint"):
            prepare(torch_folder, tmp_path / "out")
    for text in (b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1"):
        file.write_bytes(text)
        with pytest.raises(WeightsFormatError, match="is no PyTorch checkpoint"):
            prepare(torch_folder, tmp_path / "out")
    assert left(tmp_path) == ["torch"]


def test_archives_that_are_no_checkpoints(tmp_path: Path, torch_folder: Path) -> None:
    file = torch_folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        members = {m.filename: archive.read(m) for m in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UnsupportedError, match="is compressed"):
        prepare(torch_folder, tmp_path / "out")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsFormatError, match="is damaged or no checkpoint"):
        prepare(torch_folder, tmp_path / "out")
    for content in ([1, 2], {"a": 1}, {}, torch.ones(3)):
        torch.save(content, file)
        with pytest.raises(LemaError, match=r"dictionary of tensors|holds no tensors"):
            prepare(torch_folder, tmp_path / "out")


def test_bad_indices(tmp_path: Path) -> None:
    folder = split_torch(tmp_path / "absent", **{"model.ghost.weight": "pytorch_model-00001-of-00002.bin"})
    with pytest.raises(WeightsFormatError, match=r"contradicts its files: 'model\.ghost\.weight'"):
        prepare(folder, tmp_path / "out")
    folder = split_torch(tmp_path / "missing")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsNotFoundError, match="1 of 2 files it names are missing"):
        prepare(folder, tmp_path / "out")
    folder = split_torch(tmp_path / "twice")
    again = torch.load(folder / "pytorch_model-00001-of-00002.bin") | {"lm_head.weight": torch.ones(64, 32)}
    torch.save(again, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(WeightsFormatError, match=r"'lm_head\.weight' is in pytorch_model-00001.* and in"):
        prepare(folder, tmp_path / "out")


def test_shapes_of_another_model(tmp_path: Path, torch_folder: Path) -> None:
    write_companions(torch_folder, tiny(intermediate_size=40))
    with pytest.raises(ShapeMismatchError, match="9 tensors differ in shape"):
        prepare(torch_folder, tmp_path / "out")


def test_a_file_cut_short_while_it_is_read(tmp_path: Path, torch_folder: Path) -> None:
    def cut(phase: str, done: int, total: int) -> None:
        os.truncate(torch_folder / "pytorch_model.bin", 3000)

    with pytest.raises(ReadError, match=r"the file ends at byte \d+, \d+ bytes short"):
        prepare(torch_folder, tmp_path / "out", progress=cut)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, r"fp8.*FineGrainedFP8Config\(dequantize=True\)"),
        ({"load_in_4bit": True}, r"bitsandbytes.*model\.dequantize\(\)"),
        ({"bits": 4}, "unnamed"),
    ],
)
def test_quantised_models_are_refused_by_name(
    tmp_path: Path, sharded: Path, settings: dict[str, Any], name: str
) -> None:
    config = json.loads((sharded / "config.json").read_text()) | {"quantization_config": settings}
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=f"quantised with .*{name}"):
        prepare(sharded, tmp_path / "out")
    method = name.partition(".")[0]  # of those that are known it is said that there are no codes of them
    result = CliRunner().invoke(app, ["plan", str(sharded), "--device", "cpu"])
    assert result.exit_code == 1 and re.search(f"quantised with .*{method}", result.stderr)


def test_codes_without_a_word_in_the_configuration(tmp_path: Path) -> None:
    model = tiny()
    folder = write_companions(tmp_path / "in", model)
    weights = model.state_dict()
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"codes of a quantised model: model\.layers\.1\.mlp\.up_proj.*int8"):
        prepare(folder, tmp_path / "out")


@needs_gguf
def test_gguf_with_types_nobody_knows(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(), False, **LLAMA_FIELDS)
    content = source.read_bytes()
    name = b"output_norm.weight"
    at = content.index(name) + len(name) + 4 + 8  # one dimension, then the type
    source.write_bytes(content[:at] + (250).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(UnsupportedError, match=r"does not know: .*250"):
        prepare(source, tmp_path / "out")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match="one of several parts"):
        prepare(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out")


def test_which_file_is_meant(tmp_path: Path) -> None:
    choose = locate.choose_weights
    assert choose(["training_args.bin", "pytorch_model.bin", "a.gguf"], "x") == "pytorch_model.bin"
    assert choose(["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"], "x").endswith(
        "l.safetensors"
    )
    assert choose(["pytorch_model.bin", "model.safetensors.index.json"], "x").endswith("x.json")
    assert choose(["pytorch_model.bin", "pytorch_model.bin.index.json", "other.safetensors"], "x").endswith("l.bin")
    assert choose(["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "net.pth"], "x") == "net.pth"
    with pytest.raises(ConfigError, match=r"several.*a\.Q4\.gguf, a\.Q8\.gguf.*--file a\.Q4\.gguf"):
        choose(["a.Q8.gguf", "a.Q4.gguf"], "x")
    with pytest.raises(WeightsNotFoundError, match=r"no \.safetensors"):
        choose(["config.json"], "x")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    with pytest.raises(WeightsNotFoundError, match=r"without model\.safetensors\.index\.json.*Download it"):
        choose(shards, "x")
    for path in (tmp_path / "absent", "./absent", "absent.gguf", "a/b/c"):
        with pytest.raises(WeightsNotFoundError, match="no such file"):
            prepare(path)


# --- memory, kills, the hub and the command -------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
import torch
from lema.prepare import prepare
small, large, out, extra = sys.argv[1:]
prepare(small, out + "-small", dtype="float16")
status = Path("/proc/self/status").read_text().splitlines()
data = next(int(line.split()[1]) for line in status if line.startswith("VmData:")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + int(extra), data + int(extra)))
try:
    torch.load(large + "/pytorch_model.bin")
except (MemoryError, RuntimeError):
    print("too large to load")
print(prepare(large, out, dtype="float16").tensors)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_the_file_that_config_json_names_is_prepared(tmp_path: Path) -> None:
    for name in ("model.safetensors", "chosen.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text('{"transformers_weights": "chosen.safetensors"}')
    assert locate.locate(str(tmp_path)) == tmp_path / "chosen.safetensors"
    assert locate.locate(str(tmp_path), "model.safetensors") == tmp_path / "model.safetensors"


@pytest.mark.long
def test_memory_is_at_most_one_tensor(tmp_path: Path, torch_folder: Path) -> None:
    model = tiny(vocab_size=400_000)
    large = write_companions(tmp_path / "large", model)
    torch.save(model.state_dict(), large / "pytorch_model.bin")
    tensor = model.lm_head.weight.nbytes
    assert (large / "pytorch_model.bin").stat().st_size > 2 * tensor > 100_000_000
    arguments = [str(torch_folder), str(large), str(tmp_path / "out"), str(tensor)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["too large to load", "30"]
    same(tmp_path / "out", model, torch.float16)


def environment(**more: str) -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"} | more


KILLED = """
import os, signal, sys, lema.prepare.job as job
job._SYNC_BYTES = 1
def stop(phase, done, total, calls=[0]):
    calls[0] += 1
    if calls[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
print(job.prepare(sys.argv[1], sys.argv[2], max_shard_size="20KB", progress=stop).kept)
"""


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, torch_folder: Path) -> None:
    """Each run is killed after seven more tensors, and takes up what the one before it left."""
    whole = prepare(torch_folder, tmp_path / "whole", max_shard_size="20KB")
    command = [sys.executable, "-c", KILLED, str(torch_folder), str(tmp_path / "out")]
    kept = 0
    for _ in range(20):
        done = subprocess.run([*command, str(kept + 8)], capture_output=True, text=True, env=environment())
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        assert not (tmp_path / "out").exists()
        kept = len((tmp_path / ".out.prepare" / "done.jsonl").read_text().splitlines())
    assert done.returncode == 0 and kept == 28 and done.stdout == "28\n"
    assert left(tmp_path / "out") == left(whole.path)
    for name in left(whole.path):
        assert (tmp_path / "out" / name).read_bytes() == (whole.path / name).read_bytes()


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as downloads of one model need."""

    files: dict[str, bytes] = {}
    asked: list[str] = []
    claimed: dict[str, int] = {}
    """Sizes the API states, where they are not those of the files."""

    def do_GET(self) -> None:
        """Model information, or a file."""
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        sizes = {n: self.claimed.get(n, len(content)) for n, content in self.files.items()}
        tree = [
            {"type": "file", "path": n, "size": size, "oid": hashlib.sha1(n.encode()).hexdigest()}
            for n, size in sizes.items()
        ]
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith("/api/models/org/model/tree/"):
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": n, "size": size, "blobId": "0" * 40} for n, size in sizes.items()]
            self.answer(json.dumps({"id": "org/model", "sha": "a" * 40, "siblings": siblings, "tags": []}).encode())
        elif path.startswith("/org/model/resolve/") and name in self.files:
            self.answer(self.files[name], hashlib.sha1(name.encode()).hexdigest())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "org/model" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def answer(self, content: bytes, etag: str = "") -> None:
        """A whole answer, with the headers the client wants of a file."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "a" * 40)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(torch_folder: Path) -> Iterator[type[StandIn]]:
    class Hub(StandIn):
        files = {path.name: path.read_bytes() for path in torch_folder.iterdir()} | {"tf_model.h5": b"other weights"}
        asked: list[str] = []
        claimed: dict[str, int] = {}
        url = ""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.long
def test_a_hub_model_by_command(tmp_path: Path, hub: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lema", "prepare", "org/model", str(tmp_path / "out")],
        env=environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + str(hub.asked)
    same(tmp_path / "out", tiny())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    fetched = {asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /org")}
    assert "pytorch_model.bin" in fetched and not {"README.md", "tf_model.h5"} & fetched


def test_hub_models_absent_offline_and_too_large(tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hf"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(WeightsNotFoundError, match="the hub gave no model of this name"):
        prepare("org/absent", tmp_path / "out")
    with pytest.raises(WeightsNotFoundError, match=r"has no file a\.gguf\. It has README\.md, chat_template"):
        prepare("org/model", tmp_path / "out", file="a.gguf")
    hub.claimed["pytorch_model.bin"] = 10**16
    with pytest.raises(WeightsError, match=r"\(100000000\d+ bytes\) are to be downloaded, and the disk of .*hf has"):
        prepare("org/model", tmp_path / "out")
    hub.claimed.clear()
    assert not any(asked.startswith("GET /org") for asked in hub.asked) and not cache.exists()
    assert prepare("org/model", tmp_path / "out").written
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert prepare("org/model", tmp_path / "again", dtype="bfloat16").written
    with pytest.raises(WeightsNotFoundError, match="unset HF_HUB_OFFLINE"):
        prepare("org/absent", tmp_path / "out2")
    assert not hub.asked


def interrupted(*_: object, **__: object) -> None:
    """Somebody presses Ctrl-C."""
    raise KeyboardInterrupt


def test_the_command(tmp_path: Path, torch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    out = str(tmp_path / "out")
    done = run.invoke(app, ["prepare", str(torch_folder), out, "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert re.search(r"30 tensors, 54\.7 KB of bfloat16, in 1 file\. Read back", done.stdout)
    assert f"lema plan {shlex.quote(out)}" in done.stdout
    done = run.invoke(app, ["prepare", out])
    assert done.exit_code == 0 and "nothing to do, it streams well as it is" in done.stdout
    done = run.invoke(app, ["prepare", out, "--json"])
    assert json.loads(done.stdout)["written"] is False
    done = run.invoke(app, ["prepare", str(torch_folder), out])
    assert done.exit_code == 1 and "exists already" in done.stderr
    done = run.invoke(app, ["prepare", str(torch_folder), out + "2", "--dtype", "int4"])
    assert done.exit_code == 2 and "is none of float16" in done.stderr
    monkeypatch.setattr("lema.prepare.prepare", interrupted)
    done = run.invoke(app, ["prepare", str(torch_folder), out + "3"])
    assert done.exit_code == 130 and "run the same command again to go on" in done.stderr
    done = run.invoke(app, ["prepare", "--help"])
    assert "Example" in done.stdout


@pytest.mark.slow
@needs_gguf
@needs_smollm2
def test_a_real_gguf(tmp_path: Path) -> None:
    source = locate_smollm2()
    assert source is not None
    prepared = prepare(source, tmp_path / "out", max_shard_size="100MB")
    assert prepared.files == 3 and prepared.dtypes == ("float16",)
    reference = loaded(smollm2_folder())
    written = loaded(prepared.path)
    assert written.keys() == reference.keys()
    assert all(written[name].equal(reference[name].half()) for name in written)
    tokenizer = AutoTokenizer.from_pretrained(prepared.path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello" in text
