"""`quantize`, a setting of the model: weights made once and kept, and the adapter one of the model as it was named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lema
from families import save_tiny
from helpers import differing, lema_config, lema_model, lema_step, padded_batch, recording_trainer
from lema.chat.chat_model import ChatModel
from lema.cli.app import app
from lema.config import QUANTIZED, LemaConfig
from lema.errors import ConfigError
from lema.export.merge import merge
from lema.prepare import prepare
from lema.prepare.cached import cached_folder, quantised
from lema.prepare.encoders import ENCODERS
from training_runs import make_model, write_rows


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))
    save_tiny("llama", tmp_path / "source")
    return tmp_path / "source"


def test_formats_of_the_setting_are_those_that_can_be_written() -> None:
    assert tuple(ENCODERS) == QUANTIZED
    with pytest.raises(ConfigError, match="quantize"):
        LemaConfig("model", quantize="q4")


def test_weights_are_made_once_and_the_model_keeps_its_name(source: Path, tmp_path: Path) -> None:
    batch = padded_batch()
    by_hand = prepare(source, tmp_path / "codes", quantize="nf4").path
    with lema_model(by_hand) as model:
        loss, gradients = lema_step(model, batch)
    with lema_model(source, quantize="nf4") as model:
        assert lema_step(model, batch)[0] == loss
        assert not differing(gradients, lema_step(model, batch)[1])
        folder = Path(str(model.config.gbi_path))
        assert folder == cached_folder(lema_config(source, quantize="nf4")) and model.config.quantize is None
        recording_trainer(model).save_checkpoint(str(tmp_path / "checkpoint"))
    settings = json.loads((tmp_path / "checkpoint" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(source)
    saved = lema.LemaConfig.from_pretrained(tmp_path / "checkpoint")
    assert (saved.model_name_or_path, saved.gbi_path, saved.quantize) == (str(source), str(folder), None)
    made = os.stat(folder / "model.safetensors").st_mtime_ns
    assert quantised(lema_config(source, quantize="nf4")).gbi_path == str(folder)
    assert os.stat(folder / "model.safetensors").st_mtime_ns == made
    assert cached_folder(lema_config(source, quantize="int8")) != folder


def test_other_weights_are_made_anew_and_settings_without_it_stay(source: Path) -> None:
    config = lema_config(source, quantize="int8")
    before = cached_folder(config)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + torch.ones(())
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert cached_folder(config) != before
    plain = lema_config(source)
    assert quantised(plain) is plain


def test_nowhere_to_keep_them_is_said(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lema.prepare.cached.cache_folder", lambda: None)
    with pytest.raises(ConfigError, match="set LEMA_CACHE"):
        quantised(lema_config(source, quantize="nf4"))


def test_a_run_trains_on_it_goes_on_and_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMA_CACHE", str(tmp_path / "cache"))
    model = make_model(tmp_path / "model")
    settings = {
        "model_name_or_path": str(model), "train_file": str(write_rows(tmp_path / "rows.jsonl")), "device": "cpu",
        "output_dir": str(tmp_path / "out"), "dtype": "float32", "lora_target_modules": "all-linear", "lora_rank": 4,
        "max_seq_length": 64, "max_steps": 2, "quantize": "int8", "logging_steps": 1,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    words = ["train", str(tmp_path / "run.yaml"), "--plain"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (made,) = (tmp_path / "cache" / "quantized").iterdir()
    result = CliRunner().invoke(app, [*words, "--set", "max_steps=3", "--resume", "auto"])
    assert result.exit_code == 0, result.output
    assert [*(tmp_path / "cache" / "quantized").iterdir()] == [made]
    final = tmp_path / "out" / "final"
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    assert lema.LemaConfig.from_pretrained(final).gbi_path == str(made)
    with ChatModel.open(final, device="cpu", dtype="float32").model as streamed:
        assert streamed.memory.stats.loads >= 0 and streamed.gbi.path == made
    merged = merge(final, tmp_path / "merged")
    assert merged.comparison is not None and merged.comparison.good
