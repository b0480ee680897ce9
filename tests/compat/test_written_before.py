"""What earlier code wrote is read: an adapter, a checkpoint to go on from, settings.

The files beside this one were written at version 0.1.0, before the rooms were rebuilt, by `lema train run.yaml` in
their folder; that run went on to `run/final`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lema

WRITTEN = Path(__file__).with_name("written_before")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the working folder: names in them are relative."""
    folder = tmp_path / "written"
    shutil.copytree(WRITTEN, folder)
    monkeypatch.chdir(folder)
    return folder


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(lema.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lema", *command], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_settings_say_what_they_said(written: Path) -> None:
    saved = json.loads((written / "run/final/lema_config.json").read_text())
    config = lema.LemaConfig.from_pretrained("run/final")
    now = config.to_dict()
    assert {name: now.get(name) for name in saved} == saved


def test_the_adapter_answers_as_peft_reads_it(written: Path) -> None:
    ids = torch.tensor([[5, 40, 41, 60, 7]])
    base = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, "run/final").eval()
    with torch.no_grad(), lema.LemaModel.from_pretrained("run/final") as model:
        assert torch.equal(model.hf_model(input_ids=ids).logits, plain(input_ids=ids).logits)


def losses(folder: Path) -> dict[int, float]:
    """By step, of the newest time it was taken."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["type"] == "train"}


@pytest.mark.long
def test_a_checkpoint_is_gone_on_with(written: Path) -> None:
    """With the losses that the run of then had, but for what rounding is on another processor."""
    then = losses(written / "run")
    adapter = load_file(written / "run/final/adapter_model.safetensors")
    shutil.rmtree(written / "run/final")
    said = run("train", "run.yaml", "--plain", "--resume", "auto")
    assert "resumed from run/checkpoint-2 after step 2" in said
    now = losses(written / "run")
    assert sorted(now) == [1, 2, 3, 4]
    assert now == pytest.approx(then, rel=1e-3)
    again = load_file(written / "run/final/adapter_model.safetensors")
    assert again.keys() == adapter.keys()
    apart = sum(float((again[name] - adapter[name]).square().sum()) for name in adapter)
    assert apart < 0.05**2 * sum(float(tensor.square().sum()) for tensor in adapter.values())
