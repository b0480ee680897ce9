"""The recipes shipped with the package: they load, plan and train, wherever they are called from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lema.cli.app import app
from lema.data import ChatRenderer
from lema.prepare.tiny_model import tiny_model
from lema.run.training import load_tokenizer
from lema.training.run_config import RunConfig
from lema_reply.build import build, write
from lema_reply.grammar import CLOSE, OPEN

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "packages" / "lema-reply" / "src" / "lema_reply" / "recipes"
NAMES = ("smollm2_135m", "smollm2_1.7b", "tinyllama", "llama2_7b")


def recipe(name: str) -> Path:
    return RECIPES / f"lema_reply_{name}.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a tiny model and a little data where the recipes expect it."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model(folder / "tiny")
    write(build(32, held_out=8, any_size=True), folder / "data" / "training_data.jsonl", folder / "data/held_out.jsonl")
    return folder


def test_all_recipes_are_known_and_linked_at_the_root() -> None:
    assert sorted(path.name for path in RECIPES.glob("*.yaml")) == sorted(recipe(name).name for name in NAMES)
    link = ROOT / "recipes"
    assert not link.exists() or link.resolve() == RECIPES  # a package that is not a checkout has no such link


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunConfig.from_yaml(recipe(name))
    assert run.data.chat_template == str(RECIPES / "lema_reply.jinja")
    assert (run.lema.batch_size, run.lema.lora_rank, run.training.num_train_epochs) == (8, 16, 1)
    assert run.data.train_file == "data/training_data.jsonl" and run.lema.output_dir == "checkpoints"
    for line in recipe(name).read_text(encoding="utf-8").splitlines():  # a key says what it is for, or is plain
        assert line.startswith(("#", " ")) or not line or ": " in line or line.endswith(":") or "#" in line
    stored = RunConfig.from_yaml(run.resolved().save(tmp_path / "stored"))
    monkeypatch.chdir("/")
    assert RunConfig.from_yaml(tmp_path / "stored" / "run.yaml").data.chat_template == stored.data.chat_template


def test_files_beside_the_recipe_come_after_those_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "there"
    beside.mkdir()
    (beside / "run.yaml").write_text(yaml.safe_dump({"model_name_or_path": "m", "chat_template": "t.jinja"}))
    monkeypatch.chdir(tmp_path)
    assert RunConfig.from_yaml("there/run.yaml").data.chat_template == "t.jinja"  # nowhere: as it is written
    (beside / "t.jinja").write_text("there")
    assert RunConfig.from_yaml("there/run.yaml").data.chat_template == str(Path("there/t.jinja"))
    typed = RunConfig.from_yaml("there/run.yaml", {"chat_template": "t.jinja"})
    assert typed.data.chat_template == "t.jinja"  # what is typed means the working folder
    (tmp_path / "t.jinja").write_text("here")
    assert RunConfig.from_yaml("there/run.yaml").data.chat_template == "t.jinja"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_plans(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the model, whose file is put in its place."""
    monkeypatch.chdir(place)
    values = yaml.safe_load(recipe(name).read_text(encoding="utf-8"))
    values |= {"model_name_or_path": "tiny", "chat_template": str(RECIPES / "lema_reply.jinja"), "device": "cpu"}
    Path("stand-in.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    result = CliRunner().invoke(app, ["plan", "stand-in.yaml", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)


def test_data_check_shows_the_reply_and_its_end_learned(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(
        app, ["data", "check", str(recipe("llama2_7b")), "--model", "tiny"], env={"COLUMNS": "120"}
    )
    assert result.exit_code == 0, result.output
    assert f"⟦{OPEN}↵" in result.output and f"{CLOSE}<|im_end|>⟧" in result.output
    assert result.output.count("all rows are good") == 2


@pytest.mark.long
def test_a_recipe_trains_a_model_that_chat_then_asks_in_the_same_words(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    settings = {
        "model_name_or_path": "tiny", "device": "cpu", "max_steps": "2", "save_steps": "1", "eval_strategy": "no",
        "max_seq_length": "512",
    }  # fmt: skip
    pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    result = CliRunner().invoke(app, ["train", str(recipe("smollm2_135m")), "--plain", *pairs])
    assert result.exit_code == 0, result.output
    renderer = ChatRenderer(load_tokenizer("checkpoints/final"))
    assert renderer.prompt([{"role": "user", "content": "Q?"}]).endswith("<|user|>\nQ?\n\n<|assistant|>\n")
    stored = yaml.safe_load(Path("checkpoints/final/run.yaml").read_text(encoding="utf-8"))
    assert stored["chat_template"] == str(RECIPES / "lema_reply.jinja")


def test_a_build_is_what_the_recipes_expect() -> None:
    for name in NAMES:
        values = yaml.safe_load(recipe(name).read_text(encoding="utf-8"))
        assert values["train_file"] == "data/training_data.jsonl" and values["eval_file"] == "data/held_out.jsonl"
