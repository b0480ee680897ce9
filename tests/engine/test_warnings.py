"""Libraries have nothing to warn of: what they would say is set right."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from families import save_tiny
from helpers import lema_model, padded_batch
from lema.cli.app import app
from lema.models.lora import ADAPTER_CONFIG
from training_runs import tiny_tokenizer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def everything_is_said(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Warnings are errors, and transformers logs what it logs by default, each line as if for the first time."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    transformers.utils.logging.warning_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of what earlier tests left to the collector
        yield
    logger.propagate = propagate
    transformers.logging.set_verbosity(level)
    said = [r.getMessage() for r in caplog.get_records("call") if r.name.partition(".")[0] in ("transformers", "peft")]
    assert said == []


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_model_is_planned_trained_asked_and_merged(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with lema_model(tmp_path / "model", ram_budget="2GB") as model:
        model.get_trainer().train_step(padded_batch())
        model.generate(padded_batch(rows=1)["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert settings["fan_in_fan_out"] is (family == "gpt2")
    merged = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert merged.exit_code == 0, merged.output
