"""Going on: a longer run, rows cut otherwise, an adapter trained further, and checkpoints that are spoilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lema
from families import save_tiny
from hub_server import running_hub
from lema.chat import ChatModel
from lema.cli.app import app
from lema.errors import CheckpointError, ConfigError, LemaError, UnsupportedError, WeightsNotFoundError
from lema.targets import as_targets
from lema.training.run_config import parse_overrides
from training_runs import StopAfter, adapter_bytes, make_model, read_lines, settings_of, train, write_rows

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
QUIET = {"sample_prompts": [], "eval_size": 0}


@pytest.fixture(scope="module")
def done(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run of three steps."""
    out = tmp_path_factory.mktemp("done")
    train(settings_of(model, rows, out, max_steps=3, lora_rank=3, lora_alpha=5, **QUIET))
    return out / "final"


def events(out: Path) -> str:
    return " ".join(line["message"] for line in read_lines(out / "metrics.jsonl") if line["type"] == "event")


@pytest.mark.parametrize("more", [{"max_steps": 8}, {"num_train_epochs": 3}])
def test_more_steps_after_the_end(model: Path, rows: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    settings = settings_of(model, rows, tmp_path, **{**QUIET, "num_train_epochs": 1, "max_steps": -1})
    first = train(settings)
    before = adapter_bytes(tmp_path / "final")
    longer = train({**settings, **more}, resume="auto")
    assert longer.global_step > first.global_step and longer.status == "finished"
    assert adapter_bytes(tmp_path / "final") != before
    assert f"the run has {longer.global_step} steps now and had {first.global_step}" in events(tmp_path)
    assert json.loads((tmp_path / "final" / "trainer_state.json").read_text())["max_steps"] == longer.global_step
    with pytest.raises(ConfigError, match=r"the run shall have 2 in all: raise max_steps or num_train_epochs"):
        train({**settings, "max_steps": 2}, resume="auto")


def test_rows_cut_otherwise_give_the_same_numbers(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = settings_of(model, rows, tmp_path, **{**QUIET, "lora_dropout": 0.0, "num_train_epochs": 1})
    train({**settings, "output_dir": str(tmp_path / "whole")})
    train(settings, callbacks=[StopAfter(2)])
    assert train({**settings, "batch_size": 4, "gradient_accumulation_steps": 1}, resume="auto").status == "finished"
    assert "numbers may differ in the last bits from here on: micro_batch_size was 2 and is None" in events(tmp_path)
    one, other = (load_file(out / "final" / "adapter_model.safetensors") for out in (tmp_path, tmp_path / "whole"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"batch_size x gradient_accumulation_steps was 4 and is 8.*may differ"):
        train({**settings, "batch_size": 4}, resume="auto")


def test_an_adapter_is_trained_further(model: Path, done: Path, tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.jsonl", shift=3)
    settings = settings_of(
        model, more, tmp_path / "out", adapter_name_or_path=str(done), max_steps=2, learning_rate=0.0, **QUIET
    )
    train(settings)
    assert adapter_bytes(tmp_path / "out" / "final") == adapter_bytes(done), "a step of length zero moves nothing"
    config = json.loads((tmp_path / "out" / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.1)
    moved = {**settings, "learning_rate": 1e-2, "output_dir": str(tmp_path / "moved")}
    train(moved, callbacks=[StopAfter(1)])
    train(moved, resume="auto")
    train({**moved, "output_dir": str(tmp_path / "whole")})
    assert adapter_bytes(tmp_path / "moved" / "final") == adapter_bytes(tmp_path / "whole" / "final")
    assert adapter_bytes(tmp_path / "moved" / "final") != adapter_bytes(done)


def test_what_came_of_it_needs_the_first_adapter_no_more(model: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "first")
    rows = write_rows(tmp_path / "more.jsonl", shift=3)
    train(
        settings_of(model, rows, tmp_path / "out", adapter_name_or_path=str(tmp_path / "first"), max_steps=1, **QUIET)
    )
    shutil.rmtree(tmp_path / "first")
    final = tmp_path / "out" / "final"
    with lema.LemaModel.from_pretrained(final) as again:
        own = again.lora_manager.state_dict()  # type: ignore[union-attr]
    saved = load_file(final / "adapter_model.safetensors")
    assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)
    with ChatModel.open(final) as chat_model:
        assert chat_model.model.lora_manager.settings["r"] == 3  # type: ignore[union-attr]


def test_an_adapter_of_the_hub(
    model: Path, done: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(model, rows, tmp_path / "out", max_steps=1, learning_rate=0.0, **QUIET)
    with running_hub(monkeypatch, tmp_path / "hub") as hub:
        with pytest.raises(WeightsNotFoundError, match=r"'me/adapter' is neither a local path nor an adapter"):
            train({**settings, "adapter_name_or_path": "me/adapter"})
        hub.files |= {path.name: path.read_bytes() for path in done.iterdir() if path.is_file()}
        hub.files["optimizer.pt"] = b"what a trainer left there"
        train({**settings, "adapter_name_or_path": "me/adapter"})
        assert adapter_bytes(tmp_path / "out" / "final") == adapter_bytes(done), "a step of length zero moves nothing"
        with ChatModel.open("me/adapter", device="cpu") as chat_model:
            own = chat_model.model.lora_manager.state_dict()  # type: ignore[union-attr]
    saved = load_file(done / "adapter_model.safetensors")
    assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)
    assert [path.name for path in (tmp_path / "hub").rglob("optimizer.*") if path.suffix == ".pt"] == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what was fetched is still there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    train({**settings, "adapter_name_or_path": "me/adapter", "output_dir": str(tmp_path / "again")})


def test_an_adapter_of_another_base_is_refused(done: Path, rows: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    save_tiny("llama", other, seed=9)
    settings = settings_of(other, rows, tmp_path / "out", adapter_name_or_path=str(done), max_steps=1, **QUIET)
    with pytest.raises(CheckpointError, match="trained on other base weights"):
        train(settings)
    with pytest.raises(FileNotFoundError, match="holds no PEFT adapter"):
        train({**settings, "adapter_name_or_path": str(tmp_path)})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", r"adapter_model\.safetensors \(0 bytes\) cannot be read"),
        ("cut", r"adapter_model\.safetensors \(\d+ bytes\) cannot be read"),
        ("lora_alpha", r"adapter_config\.json: lora_alpha is missing"),
        ("r", r"adapter_config\.json: r is missing"),
        ("target_modules", r"adapter_config\.json: target_modules is missing"),
        ("peft_type", "is a IA3 adapter"),
        ("list", r"adapter_config\.json holds list, not an object"),
        ("deep", r"adapter_config\.json is nested too deeply"),
        ("latin", r"adapter_config\.json is not valid JSON"),
    ],
)
def test_an_adapter_that_is_spoilt(model: Path, done: Path, rows: Path, tmp_path: Path, name: str, said: str) -> None:
    spoilt = tmp_path / "adapter"
    spoilt.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(done / file, spoilt)
    weights, config = spoilt / "adapter_model.safetensors", spoilt / "adapter_config.json"
    values = json.loads(config.read_text())
    if name in ("empty", "cut"):
        weights.write_bytes(weights.read_bytes()[: {"empty": 0, "cut": 1000}[name]])
    elif name == "peft_type":
        config.write_text(json.dumps({**values, "peft_type": "IA3"}))
    elif name in values:
        config.write_text(json.dumps({key: value for key, value in values.items() if key != name}))
    else:
        config.write_bytes({"list": b"[1]", "deep": b"[" * 100_000, "latin": b'{"r": "\xe9"}'}[name])
    with pytest.raises((CheckpointError, UnsupportedError, ConfigError), match=said):
        ChatModel.open(spoilt, device="cpu")
    settings = settings_of(model, rows, tmp_path / "out", adapter_name_or_path=str(spoilt), max_steps=1, **QUIET)
    with pytest.raises(LemaError, match=said):
        train(settings)
    for words in (["chat", spoilt], ["adapter", "check", spoilt], ["export", spoilt, tmp_path / "exported"]):
        result = CliRunner().invoke(app, [str(word) for word in words], input="")
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (words, result.exception)


def test_a_checkpoint_after_every_epoch_or_none(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = settings_of(model, rows, tmp_path / "epochs", save_strategy="epoch", save_total_limit=None, **QUIET)
    steps = train(settings).global_step
    assert {p.name for p in (tmp_path / "epochs").glob("checkpoint-*")} == {
        f"checkpoint-{steps // 2}",
        f"checkpoint-{steps}",
    }
    train({**settings, "output_dir": str(tmp_path / "none"), "save_strategy": "no", "save_steps": 1, "max_steps": 2})
    assert not list((tmp_path / "none").glob("checkpoint-*"))


def test_patterns_and_exclusions_reach_peft(model: Path) -> None:
    def targeted(**more: Any) -> set[str]:
        config = lema.LemaConfig(str(model), device="cpu", dtype="float32", **more)
        with lema.LemaModel(config) as made:
            return {n.partition(".lora_")[0].rpartition("layers.")[2] for n, _ in _named(made)}

    pattern = r".*layers\.(0|2)\.self_attn\.[qk]_proj"
    chosen = {f"{layer}.self_attn.{name}_proj" for layer in (0, 2) for name in "qk"}
    assert targeted(lora_target_modules=pattern) == chosen
    assert targeted(lora_target_modules=f"{pattern}, down_proj", exclude_modules="down_proj") == chosen
    assert targeted(lora_target_modules="q_proj,k_proj", exclude_modules=r".*layers\.[13]\..*") == chosen
    with pytest.raises(ConfigError, match="Modules of this model that can have LoRA"):
        targeted(lora_target_modules=r"nothing\d")


def _named(model: lema.LemaModel) -> list[Any]:
    model.initialize_lora()
    return model.lora_manager.named_parameters()  # type: ignore[union-attr]


def test_a_run_that_is_refused_moves_nothing(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = settings_of(model, rows, tmp_path, **{**QUIET, "max_steps": 3, "save_steps": 1})
    train(settings)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="learning_rate"):
        train({**settings, "learning_rate": 0.7}, resume=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ConfigError, match="evaluation data"):
        train({**settings, "eval_strategy": "steps", "eval_steps": 1}, resume="none")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    train(settings, resume=str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "previous-1").is_dir() and "came after checkpoint-1" in events(tmp_path)


def test_an_adapter_of_another_scale_is_refused(model: Path, done: Path) -> None:
    targets = json.loads((done / "adapter_config.json").read_text())["target_modules"]
    for alpha in (5, 6):
        config = lema.LemaConfig(
            str(model), device="cpu", lora_rank=3, lora_alpha=alpha, lora_target_modules=targets, dtype="float32"
        )
        with lema.LemaModel(config) as made:
            made.initialize_lora()
            assert made.lora_manager is not None
            if alpha == 5:
                made.lora_manager.load_pretrained(done)
                continue
            with pytest.raises(CheckpointError, match=r"adapter_config\.json: lora_alpha is 5\.0, and here it is 6\.0"):
                made.lora_manager.load_pretrained(done)


def test_all_linear_stands_alone() -> None:
    for given in ("all-linear,lm_head", ["all-linear", "lm_head"]):
        with pytest.raises(ConfigError, match="all-linear means every linear module"):
            as_targets("lora_target_modules", given)
    assert parse_overrides({"lora_target_modules": '[ "q_proj", "k_proj"]'}) == {
        "lora_target_modules": ["q_proj", "k_proj"]
    }
    assert parse_overrides({"lora_target_modules": "[qk]_proj"}) == {"lora_target_modules": "[qk]_proj"}
