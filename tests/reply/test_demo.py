"""`lema demo` from its first command to its last, on a model that can learn nothing in so few steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lema.prepare.tiny_model import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_command_runs_and_a_model_that_did_not_learn_is_told_apart(tmp_path: Path) -> None:
    model, output = tiny_model(tmp_path / "tiny"), tmp_path / "out"
    words = [sys.executable, "-m", "lema", "demo", "--model", str(model), "--output", str(output), "--steps", "2",
             "--questions", "8"]  # fmt: skip
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "error: only 0% of the adapter's replies keep the format, less than 90%" in ended.stderr
    verbs = re.findall(r"^\$ lema (\w+)", ended.stdout, re.MULTILINE)
    assert verbs == ["data", "train", "eval", "chat", "merge", "report"]
    assert (output / "merged" / "model.safetensors").is_file() and (output / "run" / "report.html").is_file()
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert set(scores["arms"]) == {"base, in the format", "base, asked plainly", "adapter"}
    assert scores["questions"] == 8
    assert len((output / "training_data.jsonl").read_text(encoding="utf-8").splitlines()) == 5000
    again = subprocess.run([*words, "--least", "0"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
