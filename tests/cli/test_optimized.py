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


ONE_AFTER_ANOTHER = """
import json, sys
from typer.testing import CliRunner
from lema.cli.app import app

def run(words):
    result = CliRunner().invoke(app, words)
    if result.exit_code:
        sys.exit(f"lema {' '.join(words)}: {result.output} {result.exception!r}")
    return result.stdout

print(json.dumps([run(words) for words in json.load(open(sys.argv[1]))]))
"""


def optimized(folder: Path, *commands: tuple[object, ...]) -> list[str]:
    """Standard outputs of verbs, run without asserts in one process, since one that compiles all of torch is enough."""
    (folder / "commands.json").write_text(json.dumps([[str(word) for word in words] for words in commands]))
    (folder / "verbs.py").write_text(ONE_AFTER_ANOTHER)
    outputs: list[str] = json.loads(python(folder / "verbs.py", folder / "commands.json").splitlines()[-1])
    return outputs


def here(*words: object) -> str:
    """Standard output of a verb run in this process, where asserts are on."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_children_run_without_asserts_and_tests_with_them() -> None:
    assert python("-c", "assert False; print('on')") == "on\n"
    with pytest.raises(AssertionError, match="AssertionError"):
        python("-c", "assert False", optimize=False)


@pytest.mark.long
def test_from_a_plan_to_a_merged_model(tmp_path: Path) -> None:
    model, rows = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    out, reference = tmp_path / "out", tmp_path / "reference"
    settings: dict[str, Any] = {**settings_of(model, rows, out), "max_steps": 3, "save_steps": 2, "head": "chunked"}
    run = tmp_path / "run.yaml"
    run.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()))

    asked = ("--prompt", "red", "--max-new-tokens", "3")
    plan, trained, answer, quality, *_ = optimized(
        tmp_path,
        ("plan", run, "--hardware", "ram=8GB,disk=1GB/s,flops=1T", "--json"),
        ("train", run),
        ("generate", out / "final", *asked),
        ("eval", out / "final", "--data", rows),
        ("merge", out / "final", tmp_path / "merged"),
        ("report", out),
    )
    assert json.loads(plan)["plan"]["head"] == "chunked"
    assert "finished: 3 steps" in trained
    train({**settings, "output_dir": str(reference)})
    assert adapter_bytes(out / "final") == adapter_bytes(reference / "final")
    assert answer == here("generate", reference / "final", *asked)
    assert "perplexity" in quality
    here("merge", reference / "final", tmp_path / "other")
    merged, other = (folder / "model.safetensors" for folder in (tmp_path / "merged", tmp_path / "other"))
    assert merged.read_bytes() == other.read_bytes()
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
