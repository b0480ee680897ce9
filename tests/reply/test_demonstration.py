"""The commands of the original's second project do what they did, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lema.prepare.tiny_model import tiny_model

SCRIPTS = Path(__file__).parents[2] / "demonstration"
pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


def run(folder: Path, script: str, *words: str | Path, typed: str | None = None) -> str:
    """What a command prints, called in a folder."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, words)], cwd=folder, input=typed, capture_output=True,
        text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the data set was built and a tiny model trained on it."""
    folder = tmp_path_factory.mktemp("demonstration")
    tiny_model(folder / "tiny")
    run(folder, "data/build_dataset.py")
    assert "loss" in train(folder, 2)
    return folder


def train(folder: Path, steps: int) -> str:
    """What training up to a step prints."""
    settings = {"max_steps": steps, "logging_steps": 1, "save_steps": 1, "eval_strategy": "no", "sample_prompts": "[]",
                "device": "cpu", "dtype": "float32"}  # fmt: skip
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    model = ("--model", "tiny", "--single_file", "weights.safetensors")
    return run(folder, "training/train.py", *model, "--plain", *words)


def test_the_data_set_has_its_rows_where_the_original_had_them(place: Path) -> None:
    lines = (place / "data" / "training_data.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5_000 and all("[/LEMA_REPLY]" in json.loads(line)["text"] for line in lines)


def test_training_prepares_one_file_saves_and_goes_on(place: Path) -> None:
    assert (place / "weights.safetensors").is_file()
    assert {"checkpoint-2", "final"} <= {path.name for path in (place / "checkpoints").iterdir()}
    logged = [json.loads(line) for line in (place / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in logged)
    assert "loss" in train(place, 3)
    assert "resumed from" in (place / "checkpoints" / "metrics.jsonl").read_text()
    assert json.loads((place / "checkpoints/final/trainer_state.json").read_text())["global_step"] == 3


def test_a_chat_reads_answers_and_says_where_the_format_was_left(place: Path) -> None:
    said = run(place, "inference/run_chat.py", "checkpoints/final", "--max-new-tokens", "4", typed="Hi?\nclear\nquit\n")
    assert "with its adapter" in said and "the reply left the format" in said and "is forgotten" in said


def test_the_merged_model_is_one_that_transformers_loads(place: Path) -> None:
    words = ("--checkpoint", "checkpoints/final", "--output", "merged", "--base_model", "weights.safetensors")
    run(place, "tools/merge_adapter.py", *words)
    assert AutoModelForCausalLM.from_pretrained(place / "merged").num_parameters() > 100_000
    assert AutoTokenizer.from_pretrained(place / "merged").eos_token
