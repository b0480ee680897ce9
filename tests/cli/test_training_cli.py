"""`lema init` and `lema train` as somebody types them: what is written and said, and exit statuses."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lema.cli.app import app
from lema.training.checkpoints import CheckpointFolder
from lema.training.loop import TrainingLoop
from lema.training.run_config import RunConfig
from training_runs import adapter_bytes, make_model, settings_of, train, write_rows

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return make_model(folder / "model"), write_rows(folder / "rows.jsonl")


def lema(*arguments: Any, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + str(result.exception)
    return result


def words(result: Result) -> str:
    """What was said on standard error, without frames and line ends."""
    return " ".join(result.stderr.replace("│", " ").split())


def run_file(parts: tuple[Path, Path], folder: Path, **more: Any) -> Path:
    """A YAML file that leaves budgets to the command line."""
    values = settings_of(*parts, folder / "out", **more)
    values = {name: value for name, value in values.items() if "budget" not in name}
    path = folder / "run.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items()))
    return path


@pytest.mark.long
def test_from_a_model_and_rows_to_an_adapter(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = lema("init", *parts).stdout
    assert "22 rows of the form messages" in said and "none is held out" in said
    assert "lema train run.yaml --dry-run" in said
    written = RunConfig.from_yaml(tmp_path / "run.yaml")
    assert written.lema.max_seq_length == 64, "the model's own limit"
    assert (written.lema.ram_budget, written.lema.dtype) == ("auto", "float32")
    assert "is there already" in lema("init", *parts, status=1).stderr
    lema("init", *parts, "--force")
    small = ("--set", "lora_rank=2", "--set", "max_steps=2")
    said = lema("train", "run.yaml", *small, "--dry-run").stdout
    for word in ("22 rows", "2 steps of 8 rows, 2 to go", "host memory", "nothing was trained"):
        assert word in said
    assert not (tmp_path / "output").exists(), "a dry run makes nothing"
    said = lema("train", "run.yaml", *small).stdout
    assert "step 2/2" in said
    assert "finished: 2 steps" in said
    assert "lema chat" in said
    assert (tmp_path / "output" / "final" / "adapter_model.safetensors").is_file()
    assert RunConfig.from_yaml(tmp_path / "output" / "final" / "run.yaml").lema.lora_rank == 2
    assert "--resume auto goes on" in lema("train", "run.yaml", *small, status=1).stderr
    assert "finished: 2 steps" in lema("train", "run.yaml", *small, "--resume", "auto").stdout
    fewer = lema("train", "run.yaml", "--set", "lora_rank=2", "--set", "max_steps=1", "--resume", "auto", status=1)
    assert "final has 2 steps, and the run shall have 1 in all: raise max_steps" in fewer.stderr
    said = lema("train", "run.yaml", "--set", "lora_rank=2", "--set", "max_steps=3", "--resume", "auto").stdout
    assert "the run has 3 steps now and had 2: the learning rate follows" in said and "finished: 3 steps" in said
    assert "max_steps counts" not in said and "max_steps=3: optimizer steps" in said


@pytest.mark.long
def test_an_interrupted_run_says_how_to_go_on(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_file(parts, tmp_path, ram_budget="auto")
    lema("train", file, "--set", f"output_dir={tmp_path / 'whole'}")
    step = TrainingLoop._step

    def interrupted(self: TrainingLoop, batch: Any) -> None:
        step(self, batch)
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "_step", interrupted)
        said = lema("train", file, "--set", "save_steps=4", status=130).stdout
    assert "interrupted after step 3" in said
    assert f"lema train {shlex.quote(str(file))} --set save_steps=4 --resume auto" in said
    saved = json.loads((tmp_path / "out" / "checkpoint-3" / "lema_config.json").read_text())
    assert isinstance(saved["ram_budget"], int), "what auto came to is kept for the resume"
    lema("train", file, "--resume", "auto")
    assert (
        json.loads((tmp_path / "out" / "final" / "lema_config.json").read_text())["ram_budget"] == saved["ram_budget"]
    )
    assert adapter_bytes(tmp_path / "out" / "final") == adapter_bytes(tmp_path / "whole" / "final")


@pytest.mark.long
def test_a_limit_of_time_is_no_failure(parts: tuple[Path, Path], tmp_path: Path) -> None:
    file = run_file(parts, tmp_path, save_steps=2)
    said = lema("train", file, "--set", "max_train_hours=1e-9").stdout
    assert "stopped after step 0 by max_train_hours=1e-09. Go on with:" in said
    assert f"lema train {shlex.quote(str(file))} --set max_train_hours=1e-9 --resume auto" in said
    assert "finished" in lema("train", file, "--resume", "auto").stdout


def test_a_dry_run_looks_and_touches_nothing(parts: tuple[Path, Path], tmp_path: Path) -> None:
    file = run_file(parts, tmp_path)
    out = tmp_path / "out"
    folder = CheckpointFolder(out)
    folder.open()
    before = sorted(tmp_path.rglob("*"))
    assert "in use by another run" in lema("train", file, "--dry-run", status=1).stderr
    folder.close()
    assert "nothing was trained" in lema("train", file, "--dry-run").stdout
    assert sorted(tmp_path.rglob("*")) == before
    said = lema("train", file, "--dry-run", "--set", f"output_dir={file}/inside", status=1).stderr
    assert f"{file} is not a directory" in said
    no_data = ("--set", "eval_size=0", "--set", "eval_strategy=epoch", "--set", "sample_prompts=")
    said = lema("train", file, "--dry-run", *no_data, status=1).stderr
    assert "eval_strategy=epoch needs evaluation data" in said


@pytest.mark.long
def test_python_and_the_command_line_do_the_same(parts: tuple[Path, Path], tmp_path: Path) -> None:
    file = run_file(parts, tmp_path)
    lema("train", file, "--set", "ram_budget=none", "--set", "vram_budget=none")
    train(settings_of(*parts, tmp_path / "python"))
    assert adapter_bytes(tmp_path / "out" / "final") == adapter_bytes(tmp_path / "python" / "final")


def test_what_cannot_be_run(parts: tuple[Path, Path], tmp_path: Path) -> None:
    file = run_file(parts, tmp_path)
    lema("train", status=2)
    lema("train", file, "--set", "nonsense", status=2)
    for given, said in (
        ("learning_rat=1", "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("max_steps=many", "max_steps='many' must be a whole number"),
        ("lora_dropout=2", "lora_dropout=2.0 must be 0 or more and less than 1"),
        ("cutoff_len=0", "max_seq_length=0 must be 1 or more"),
        ("lr_scheduler_type=cosin", "did you mean 'cosine'?"),
    ):
        assert said in words(lema("train", file, "--set", given, status=2)), given
    wrong = run_file(parts, tmp_path / "wrong", lora_dropout=2)
    assert "line" in lema("train", wrong, status=1).stderr, "what the file says is no bad usage"
    for verb in ("merge", "export", "prepare"):
        assert "none of float16" in words(lema(verb, tmp_path, tmp_path / "x", "--dtype", "int4", status=2))
    assert "is not a file" in lema("train", tmp_path / "none.yaml", status=1).stderr
    assert "does not exist" in lema("train", file, "--set", "train_file=none.jsonl", status=1).stderr
    assert "does not exist" in lema("train", file, "--resume", tmp_path / "checkpoint-7", status=1).stderr
    assert "no config.json" in lema("init", tmp_path, parts[1], "-o", tmp_path / "x.yaml", status=1).stderr
    assert not (tmp_path / "x.yaml").exists()


def test_the_command_line_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, lema.cli.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
