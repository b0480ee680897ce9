"""Paths with `~` and variables: in settings, in a file of settings and on the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lema import LemaConfig
from lema.cli.app import app
from lema.data import DataConfig
from lema.errors import ConfigError
from lema.paths import expanded
from lema.training.run_config import RunConfig
from training_runs import make_model, write_rows


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, a variable that names it, and a working folder beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "home"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "is_"),
    [
        ("~", "{home}"), ("~/x", "{home}/x"), ("$HOME/x", "{home}/x"), ("${PLACE}/x/$PLACE", "{home}/x/{home}"),
        ("~/$USERX/b", "{home}/me/b"), ("a/~/b", "a/~/b"), ("./~/b", "./~/b"), ("org/name", "org/name"), ("-", "-"),
        ("a~b", "a~b"), ("100$", "100$"), ("", ""),
    ],
)  # fmt: skip
def test_as_a_shell_would(home: Path, monkeypatch: pytest.MonkeyPatch, text: str, is_: str) -> None:
    monkeypatch.setenv("USERX", "me")
    assert expanded("output_dir", text) == is_.format(home=home)


@pytest.mark.parametrize("text", ["$NOWHERE/x", "${NOWHERE}/x", "~/$NOWHERE", "~nobody-of-that-name/x", "${}/x"])
def test_what_is_not_set_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^output_dir=.*(NOWHERE is not set|~nobody-of-that-name|is not set)"):
        LemaConfig("m", output_dir=text)


def test_a_folder_whose_name_has_a_dollar_stays_when_expanded_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tmp_path / "ho$me" / "a"
    strange.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(strange))
    once = LemaConfig("m", output_dir="~/$PLACE/x").output_dir
    assert once == f"{strange}/{os.environ['PLACE']}/x"
    assert LemaConfig("m", output_dir=once).output_dir == once
    (tmp_path / "work" / "$NOWHERE").mkdir()
    assert LemaConfig("m", output_dir="./$NOWHERE/x").output_dir == "./$NOWHERE/x"


def test_every_setting_that_is_a_path(home: Path, tmp_path: Path) -> None:
    config = LemaConfig("~/m", gbi_path="$HOME/w.safetensors", output_dir="~/o")
    assert (config.model_name_or_path, config.gbi_path) == (f"{home}/m", f"{home}/w.safetensors")
    data = DataConfig(train_file="~/t.jsonl", eval_file="$PLACE/e.jsonl", chat_template="${HOME}/c.jinja")
    assert (data.train_file, data.eval_file) == (f"{home}/t.jsonl", f"{home}/e.jsonl")
    assert data.chat_template == f"{home}/c.jinja"
    (tmp_path / "run.yaml").write_text("model_name_or_path: ~/m\noutput_dir: $HOME/o\ntrain_file: $PLACE/t\n")
    run = RunConfig.from_yaml(tmp_path / "run.yaml", {"eval_file": "~/e"})
    assert (run.lema.output_dir, run.data.train_file, run.data.eval_file) == (f"{home}/o", f"{home}/t", f"{home}/e")
    (tmp_path / "run.yaml").write_text("model_name_or_path: ~/m\noutput_dir: $NOWHERE/o\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 2: output_dir=.*NOWHERE is not set"):
        RunConfig.from_yaml(tmp_path / "run.yaml")


def lema(*arguments: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + str(result.exception)
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.long
def test_the_command_line(home: Path) -> None:
    make_model(home / "model")
    write_rows(home / "rows.jsonl")
    lema("init", "~/model", "$PLACE/rows.jsonl", "--out=~/run.yaml")
    assert (home / "run.yaml").is_file() and not Path("~").exists()
    lema("train", "${PLACE}/run.yaml", "--set", "output_dir=~/out", "--set", "max_steps=1", "--set", "lora_rank=2")
    assert (home / "out" / "final").is_dir()
    lema("data", "check", "$HOME/rows.jsonl", "--model=~/model")
    lema("adapter", "check", "~/out/final", "--for", "peft")
    lema("export", "~/out/final", "$HOME/adapter")
    lema("train", "~/run.yaml", "--set", "output_dir=~/out", "--set", "lora_rank=2", "--set", "max_steps=1",
         "--resume=~/out/final")  # fmt: skip
    (home / "prompts.jsonl").write_text(json.dumps({"prompt": "costs $5, ~ $NOWHERE"}) + "\n")
    lema("generate", "~/model", "--file=~/prompts.jsonl", "--max-new-tokens", "1", "--no-adapter")
    lema("generate", "~/model", "-p", "costs $5, ~ $NOWHERE", "--max-new-tokens", "1", "--no-adapter")
    said = lema("data", "check", "$NOWHERE/rows.jsonl", "--model", "~/model", status=2)
    assert "NOWHERE is not set" in said
    assert "NOWHERE is not set" in lema("chat", "$NOWHERE/x", status=2)
    assert "NOWHERE is not set" in lema("train", "~/run.yaml", "--set", "output_dir=$NOWHERE", status=2)
