"""`quantize`, a setting of the model: weights made once and kept, and the adapter one of the model as it was named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lema
from families import save_tiny
from helpers import differing, lema_config, lema_model, lema_step, padded_batch, recording_trainer
from lema.config import QUANTIZED, LemaConfig
from lema.errors import ConfigError
from lema.prepare import prepare
from lema.prepare.cached import cached_folder, quantised
from lema.prepare.encoders import ENCODERS


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
