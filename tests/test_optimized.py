"""The command line as `python -O` runs it, without asserts: the same answers, to the byte where they are files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lema
from lema.cli.app import app
from training_runs import adapter_bytes, make_model, settings_of, train, write_rows

pytestmark = pytest.mark.timeout(900)


def python(*words: object, optimize: bool = True) -> str:
    """Standard output of a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path(lema.__file__).parents[1]), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    env["PYTHONOPTIMIZE"] = "1" if optimize else ""
    done = subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def here(*words: object) -> str:
    """Standard output of a verb run in this process, where asserts are on."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_children_run_without_asserts_and_tests_with_them() -> None:
    assert python("-c", "assert False; print('on')") == "on\n"
    with pytest.raises(AssertionError, match="AssertionError"):
        python("-c", "assert False", optimize=False)


def test_from_a_plan_to_a_merged_model(tmp_path: Path) -> None:
    model, rows = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    out, reference = tmp_path / "out", tmp_path / "reference"
    settings: dict[str, Any] = {**settings_of(model, rows, out), "max_steps": 3, "save_steps": 2, "head": "chunked"}
    run = tmp_path / "run.yaml"
    run.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()))

    planned = json.loads(python("-m", "lema", "plan", run, "--hardware", "ram=8GB,disk=1GB/s,flops=1T", "--json"))
    assert planned["plan"]["head"] == "chunked"
    assert "finished: 3 steps" in python("-m", "lema", "train", run)
    train({**settings, "output_dir": str(reference)})
    assert adapter_bytes(out / "final") == adapter_bytes(reference / "final")
    asked = ("--prompt", "red", "--max-new-tokens", "3")
    assert python("-m", "lema", "generate", out / "final", *asked) == here("generate", reference / "final", *asked)
    assert "perplexity" in python("-m", "lema", "eval", out / "final", "--data", rows)
    python("-m", "lema", "merge", out / "final", tmp_path / "merged")
    here("merge", reference / "final", tmp_path / "other")
    merged, other = (folder / "model.safetensors" for folder in (tmp_path / "merged", tmp_path / "other"))
    assert merged.read_bytes() == other.read_bytes()
    python("-m", "lema", "report", out)
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
