"""How runs end, and what may be gone on with: limits of time, callbacks that fail, trackers, other evaluation data."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from typer.testing import CliRunner

from families import save_tiny
from lema import LemaTrainer
from lema.cli.app import app
from lema.errors import CallbackError, CheckpointError, ConfigError, NonFiniteError, UnsupportedError
from lema.training.config import TrainingConfig
from lema.training.time_limit import TimeLimit
from training_runs import (
    StopAfter,
    adapter_bytes,
    make_model,
    read_lines,
    settings_of,
    tiny_tokenizer,
    train,
    write_rows,
)

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def whole(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert train(settings_of(model, rows, out)).status == "finished"
    return out


# -- a limit of time -------------------------------------------------------------------------------


class Clock:
    """A clock that stands until it is put forward."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_limit_leaves_room_for_what_is_to_come() -> None:
    clock = Clock()
    limit = TimeLimit(1.0, 0.0, clock)
    assert limit.allows("step", "save")
    with limit.timed("step"):
        clock.now = 800.0
    clock.now = 2500.0
    assert limit.allows("step")  # 800 seconds and a quarter more, and one in a hundred of the hour
    clock.now = 2600.0
    assert not limit.allows("step")
    assert limit.allows("save"), "was never done yet"
    clock.now = 3590.0
    assert not limit.allows()
    assert TimeLimit(None, 0.0, clock).allows("step")
    with pytest.raises(ConfigError, match=r"max_train_hours=0\.0 must be more than 0"):
        TrainingConfig(max_train_hours=0)


@pytest.mark.parametrize("late", ["step", "evaluation"])
def test_a_run_stops_by_itself_and_goes_on_as_one_never_stopped(
    model: Path, rows: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """In time's fourth step, or in the midst of the evaluation after the third."""
    clock = Clock()

    def prepare(trainer: LemaTrainer) -> None:
        def forward(module: Any, *_: Any) -> None:
            if late == "step":
                clock.now += 100.0 if module.training and trainer.global_step >= 3 else 0.0
            elif not module.training and trainer.global_step == 3:
                clock.now += 3600.0

        trainer.lm.layers[2].register_forward_hook(forward)

    monkeypatch.setattr("lema.training.run.TimeLimit", lambda hours, began: TimeLimit(hours, 0.0, clock))
    settings = settings_of(model, rows, tmp_path, max_train_hours=0.08, sample_prompts=[])
    result = train(settings, prepare=prepare)
    step = {"step": 5, "evaluation": 3}[late]
    assert (result.status, result.global_step) == ("stopped", step)
    assert result.adapter == tmp_path / f"checkpoint-{step}"
    events = [line for line in read_lines(tmp_path / "metrics.jsonl") if line.get("event") == "out_of_time"]
    assert [line["message"] for line in events] == [f"max_train_hours=0.08: stopped after step {step}"]
    monkeypatch.undo()
    assert train({**settings, "max_train_hours": 5}, resume="auto").status == "finished"
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(whole / "final")


# -- callbacks and trackers ------------------------------------------------------------------------


class Failing(TrainerCallback):
    """Raises at an event of some step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._raise)

    def _raise(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyError("mine")


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate", "on_step_begin", "on_train_end"])
def test_a_callback_that_fails_costs_no_step(model: Path, rows: Path, whole: Path, tmp_path: Path, event: str) -> None:
    settings = settings_of(model, rows, tmp_path)
    step = {"on_log": 4, "on_evaluate": 6, "on_train_end": 10}.get(event, 3)
    with pytest.raises(
        CallbackError, match=rf"callback Failing failed in {event} at step {step}: KeyError: 'mine'"
    ) as e:
        train(settings, callbacks=[Failing(event, step)])
    assert isinstance(e.value.__cause__, KeyError)
    saved = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert saved == (["final"] if event == "on_train_end" else [f"checkpoint-{step}"])
    train(settings, resume="auto")
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(whole / "final")


def fake_tracker(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    told: list[Any] = []
    fake = types.ModuleType(name)
    fake.init = lambda **kw: told.append("init")  # type: ignore[attr-defined]
    fake.log = lambda values, step: told.append(step)  # type: ignore[attr-defined]
    fake.finish = lambda **kw: told.append(kw)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, fake)
    return told


def test_trackers_are_told_of_the_end_however_it_comes(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, trackio = fake_tracker(monkeypatch, "wandb"), fake_tracker(monkeypatch, "trackio")
    settings = settings_of(model, rows, tmp_path / "a", report_to=["wandb", "trackio"], sample_prompts=[])

    def not_finite(trainer: LemaTrainer) -> None:
        bad = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
        bad.register_hook(lambda g: g * float("inf"))

    with pytest.raises(NonFiniteError):
        train(settings, prepare=not_finite)
    assert (wandb[-1], trackio[-1]) == ({"exit_code": 1}, {})
    with pytest.raises(CallbackError):
        train({**settings, "output_dir": str(tmp_path / "b")}, callbacks=[Failing("on_log", 2)])
    assert (wandb[-1], trackio[-1]) == ({"exit_code": 1}, {})
    train({**settings, "output_dir": str(tmp_path / "c")}, callbacks=[StopAfter(2)])
    assert (wandb[-1], trackio[-1]) == ({"exit_code": 0}, {})
    assert [wandb.count("init"), wandb.count({"exit_code": 1}), wandb.count({"exit_code": 0})] == [3, 2, 1]
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"pip install 'trackio>=0\.20'"):
        train({**settings, "output_dir": str(tmp_path / "d")})
    assert wandb.count("init") == 3, "the first is not begun where the second is missing"


@pytest.mark.parametrize("fails", [False, True])
def test_tensorboard_itself(model: Path, rows: Path, tmp_path: Path, fails: bool) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    settings = settings_of(model, rows, tmp_path, report_to="tensorboard", run_name="mine", max_steps=6)
    if fails:
        with pytest.raises(CallbackError):
            train(settings, callbacks=[Failing("on_step_begin", 5)])
    else:
        train(settings)
    events = accumulator.EventAccumulator(str(tmp_path / "runs" / "mine"))
    events.Reload()
    lines = read_lines(tmp_path / "metrics.jsonl")
    told = [(event.step, event.value) for event in events.Scalars("train/learning_rate")]
    made = {line["step"]: line["learning_rate"] for line in lines if line["type"] == "train"}
    assert told == [(step, pytest.approx(made[step])) for step in ((2, 4) if fails else (2, 4, 6))]
    losses = [(event.step, event.value) for event in events.Scalars("eval/loss")]
    evaluations = {line["step"]: line["eval_loss"] for line in lines if line["type"] == "eval"}
    assert losses == [(step, pytest.approx(evaluations[step])) for step in ((3,) if fails else (3, 6))]


def test_wandb_itself_without_a_network(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb, 60 MB with what it needs, is not among the packages of the tests")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    settings = settings_of(model, rows, tmp_path, report_to="wandb", max_steps=4, sample_prompts=[])
    assert train(settings).status == "finished"
    (written,) = (tmp_path / "wandb").glob("offline-run-*")
    (records,) = written.glob("run-*.wandb")
    content = records.read_bytes()
    for word in (b"train/loss", b"eval/token_accuracy", b"learning_rate"):
        assert word in content


def test_packing_is_refused_before_all_rows_are_counted(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("opt", tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    monkeypatch.setattr("lema.data.dataset.TokenDataset.sizes", lambda self: pytest.fail("rows were counted"))
    settings = settings_of(tmp_path / "opt", rows, tmp_path / "out", packing=True)
    with pytest.raises(UnsupportedError, match="OPTForCausalLM cannot train on packed rows"):
        train(settings)
    values = {name: value for name, value in settings.items() if "budget" not in name}
    (tmp_path / "run.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items()))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert done.exit_code == 1 and "OPTForCausalLM cannot train on packed rows" in done.stderr


# -- what a resume refuses -------------------------------------------------------------------------


def test_other_evaluation_data_is_noticed(model: Path, rows: Path, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", 4, shift=3)
    settings = settings_of(model, rows, tmp_path / "out", eval_size=0, eval_file=str(held))
    train(settings, callbacks=[StopAfter(4)])
    other = write_rows(tmp_path / "other.jsonl", 5, shift=3)
    said = r"other.jsonl is not the data the checkpoint was evaluated on: held.jsonl then, other.jsonl now; 4 rows then"
    with pytest.raises(CheckpointError, match=said):
        train({**settings, "eval_file": str(other)}, resume="auto")
    with pytest.raises(CheckpointError, match=r"was evaluated on held.jsonl, and now there is no such data"):
        train({**settings, "eval_file": None}, resume="auto")
    before = held.read_text()
    held.write_text(before.replace("green", "brown"))
    with pytest.raises(CheckpointError, match="evaluated on: content"):
        train(settings, resume="auto")
    moved = tmp_path / "moved.jsonl"
    moved.write_text(before)
    assert train({**settings, "eval_file": str(moved)}, resume="auto").status == "finished"


def test_evaluation_may_be_added(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = settings_of(model, rows, tmp_path / "out", eval_size=0)
    train(settings, callbacks=[StopAfter(4)])
    held = write_rows(tmp_path / "held.jsonl", 4, shift=3)
    assert "eval_loss" in train({**settings, "eval_file": str(held)}, resume="auto").metrics


def test_another_configuration_of_the_same_weights_is_refused(rows: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    settings = settings_of(model, rows, tmp_path / "out")
    train(settings, callbacks=[StopAfter(2)])
    config = json.loads((model / "config.json").read_text())
    kept = json.dumps(config)
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 500.0}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"another config\.json: rope_parameters\.rope_theta was 10000\.0 and is 500\.0"
    ):
        train(settings, resume="auto")
    (model / "config.json").write_text(kept.replace('"use_cache": false', '"use_cache": true'))
    shutil.copytree(model, tmp_path / "elsewhere")
    settings["model_name_or_path"] = str(tmp_path / "elsewhere")
    assert train(settings, resume="auto").status == "finished"


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_without_data_are_refused(model: Path, rows: Path, tmp_path: Path, strategy: str) -> None:
    settings = settings_of(model, rows, tmp_path / strategy, eval_size=0, eval_strategy=strategy, sample_prompts=[])
    with pytest.raises(
        ConfigError, match=f"eval_strategy={strategy} needs evaluation data: set eval_file or eval_size"
    ):
        train(settings)
    assert train({**settings, "sample_prompts": ["red"], "max_steps": 1}).status == "finished", "samples alone will do"
