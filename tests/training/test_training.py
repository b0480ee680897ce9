"""The training loop over a tiny model: exact resume, signals, evaluation, samples, numbers that are not finite."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

import lema
from helpers import lema_model, padded_batch, relative
from lema import LemaTrainer
from lema.engine.loss_scale import LossScale
from lema.engine.update import step_optimizer
from lema.errors import CheckpointError, ConfigError, NonFiniteError, ReadError
from lema.training.config import TrainingConfig
from lema.training.evaluation import evaluate
from lema.training.panel import LivePanel, View
from lema.training.schedule import Schedule
from training_runs import (
    StopAfter,
    adapter_bytes,
    batches_of,
    history,
    make_model,
    read_lines,
    settings_of,
    train,
    write_rows,
)

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
STEPS = 10  # two epochs of 18 rows, 4 a step


@pytest.fixture(scope="module")
def whole(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never stopped."""
    out = tmp_path_factory.mktemp("whole")
    result = train(settings_of(model, rows, out))
    assert (result.status, result.global_step) == ("finished", STEPS)
    return out


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_at_any_step_and_resumed_is_one_never_stopped(
    model: Path, rows: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    settings = settings_of(model, rows, tmp_path)
    stopped = train(settings, callbacks=[StopAfter(step)])
    assert (stopped.status, stopped.global_step) == ("interrupted", step)
    assert stopped.adapter == tmp_path / f"checkpoint-{step}"
    torch.manual_seed(999)
    result = train(settings, resume="auto")
    assert result.global_step == STEPS
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(whole / "final")
    assert history(tmp_path / "final") == history(whole / "final")
    assert (tmp_path / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for name in ("optimizer.safetensors", "rng_state.safetensors", "rng_state.json", "scheduler.json"):
        assert (tmp_path / "final" / name).read_bytes() == (whole / "final" / name).read_bytes(), name


def test_packed_and_stopped_twice(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**settings_of(model, rows, tmp_path / "whole"), "packing": True, "num_train_epochs": 4, "save_steps": 2}
    steps = train(settings).global_step
    assert steps >= 6
    settings["output_dir"] = str(tmp_path / "parts")
    for stop in (3, 5):
        assert train(settings, resume="auto", callbacks=[StopAfter(stop)]).status == "interrupted"
    train(settings, resume="auto")
    assert adapter_bytes(tmp_path / "parts" / "final") == adapter_bytes(tmp_path / "whole" / "final")


def test_half_precision_with_its_loss_scale(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**settings_of(model, rows, tmp_path / "whole"), "dtype": "float16", "sample_prompts": []}
    train(settings)
    settings["output_dir"] = str(tmp_path / "parts")
    train(settings, callbacks=[StopAfter(4)])
    train(settings, resume="auto")
    assert adapter_bytes(tmp_path / "parts" / "final") == adapter_bytes(tmp_path / "whole" / "final")


def test_a_second_signal_abandons_the_step_and_saves_the_one_before(
    model: Path, rows: Path, whole: Path, tmp_path: Path
) -> None:
    settings = settings_of(model, rows, tmp_path)

    def prepare(trainer: LemaTrainer) -> None:
        def twice(module: torch.nn.Module, *_: Any) -> None:
            if module.training and trainer.global_step == 3:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)

        trainer.lm.layers[2].register_forward_hook(twice)

    result = train({**settings, "sample_prompts": []}, prepare=prepare)
    assert (result.status, result.global_step) == ("interrupted", 3)
    assert result.adapter == tmp_path / "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "handlers are put back"
    train(settings, resume="auto")
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(whole / "final")


def test_a_read_error_saves_what_was_done(
    model: Path, rows: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    settings = settings_of(model, rows, tmp_path)
    real, count = os.preadv, 0

    def failing(*args: Any) -> int:
        nonlocal count
        count += 1
        if count > 60:
            raise OSError(5, "Input/output error")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", failing)
        with pytest.raises(ReadError):
            train(settings)
    saved = list(tmp_path.glob("checkpoint-*"))
    assert len(saved) == 1
    train(settings, resume="auto")
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(whole / "final")


# -- refusals --------------------------------------------------------------------------------------


def test_resumes_that_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = settings_of(model, rows, tmp_path / "run")
    train(settings, callbacks=[StopAfter(2)])
    with pytest.raises(ConfigError, match="holds checkpoint-2 already: --resume auto"):
        train(settings)
    for change, said in (
        ({"learning_rate": 1e-4}, "learning_rate was 0.005 and is 0.0001"),
        ({"batch_size": 1}, "batch_size x gradient_accumulation_steps was 4 and is 2"),
        ({"lora_rank": 2}, "lora_rank was 4 and is 2"),
        ({"train_file": str(write_rows(tmp_path / "other.jsonl", shift=1))}, "not the data"),
        ({"model_name_or_path": str(make_model(tmp_path / "other", seed=5))}, "other base weights"),
    ):
        with pytest.raises(CheckpointError, match=said):
            train({**settings, **change}, resume="auto")
    free = {"save_steps": 1, "logging_steps": 1, "eval_steps": 2, "sample_prompts": [], "save_total_limit": 2}
    assert train({**settings, **free}, resume="auto").status == "finished"
    assert train({**settings, **free}, resume="auto").status == "finished", "nothing is left to do"
    assert train(settings, resume="none").status == "finished"
    assert (tmp_path / "run" / "previous-1" / "final" / "COMPLETE").is_file()
    assert (tmp_path / "run" / "previous-1" / "metrics.jsonl").is_file()


def test_a_constant_schedule_may_be_made_longer(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**settings_of(model, rows, tmp_path / "long"), "lr_scheduler_type": "constant_with_warmup"}
    train({**settings, "num_train_epochs": 2})
    settings["output_dir"] = str(tmp_path / "longer")
    train({**settings, "num_train_epochs": 1})
    train({**settings, "num_train_epochs": 2}, resume="auto")
    assert adapter_bytes(tmp_path / "longer" / "final") == adapter_bytes(tmp_path / "long" / "final")


def test_two_runs_in_one_folder(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = settings_of(model, rows, tmp_path, num_train_epochs=1)
    errors = []

    class Another(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                with pytest.raises(ConfigError, match="in use by another run") as caught:
                    train(settings, resume="auto")
                errors.append(caught)

    train(settings, callbacks=[Another()])
    assert errors


# -- the same loss however it is cut ---------------------------------------------------------------


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_lines(out / "metrics.jsonl") if line["type"] == "train"]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 4, "gradient_accumulation_steps": 1},
        {"batch_size": 1, "gradient_accumulation_steps": 4},
        {"batch_size": 4, "gradient_accumulation_steps": 1, "micro_batch_size": 3},
        {"loss_chunk_size": 7},
    ],
    ids=["one batch", "accumulated", "micro-batches", "loss in pieces"],
)
def test_the_loss_is_the_same_however_a_step_is_cut(model: Path, rows: Path, tmp_path: Path, change: Any) -> None:
    settings = {**settings_of(model, rows, tmp_path / "a"), "lora_dropout": 0.0, "sample_prompts": [], "max_steps": 4}
    train(settings)
    train({**settings, **change, "output_dir": str(tmp_path / "b")})
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(first) == 4
    assert all(relative(a, b) <= 1e-6 for a, b in zip(first, second, strict=True)), (first, second)


def test_packing_and_padding_side_leave_the_loss_as_it_is(model: Path, rows: Path, tmp_path: Path) -> None:
    from lema.data import load_data
    from lema.training.run_config import RunConfig
    from training_runs import tiny_tokenizer

    settings = {**settings_of(model, rows, tmp_path), "eval_size": 0}
    found = {}
    with lema_model(model) as streamed:
        trainer = streamed.get_trainer()
        for name, change in (("plain", {}), ("packed", {"packing": True}), ("left", {}), ("pairs", {"batch_size": 1})):
            run = RunConfig.from_dict({**settings, **change})
            data = load_data(
                run.data, tiny_tokenizer(), max_seq_length=40, rows_per_step=run.rows_per_step, seed=1,
                padding_side="left" if name == "left" else "right",
            )  # fmt: skip
            batches = [next(data.train) for _ in range(data.train.steps_per_epoch)]
            found[name] = evaluate(trainer, batches)
    targets = {metrics["eval_targets"] for metrics in found.values()}
    assert len(targets) == 1
    for metrics in found.values():
        assert relative(metrics["eval_loss"], found["plain"]["eval_loss"]) <= 1e-6
        assert metrics["eval_token_accuracy"] == found["plain"]["eval_token_accuracy"]


@pytest.mark.parametrize("settings", [{}, {"loss_chunk_size": 5}, {"head": "chunked", "ram_budget": "2GB"}])
def test_token_accuracy_is_that_of_the_whole_logits(model: Path, settings: dict[str, Any]) -> None:
    batch = padded_batch(6, 12)
    with lema_model(model, **settings) as streamed:
        trainer = streamed.get_trainer()
        logits, loss = trainer.eval_step(batch, return_logits=True)
        assert logits is not None
        targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        right = int((logits.argmax(-1) == targets).sum())
        # labels the model has right, so that there is something to count
        best = logits.argmax(-1)
        hinted = {**batch, "labels": torch.cat((batch["labels"][:, :1], best[:, :-1]), 1)}
        hinted["labels"][batch["attention_mask"] == 0] = -100
        hinted["labels"][2] = batch["labels"][2]
        shifted = torch.nn.functional.pad(hinted["labels"], (0, 1), value=-100)[:, 1:]
        expected = int((best == shifted).sum())
        summed, count, correct = trainer.evaluate(batch)
        assert (count, correct) == (int((targets != -100).sum()), right)
        assert relative(summed / count, loss or 0.0) < 1e-6
        assert trainer.evaluate(hinted)[2] == expected > 40


# -- numbers that are not finite -------------------------------------------------------------------


def test_a_bad_step_is_skipped_and_counted_and_a_few_in_a_row_end_the_run(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    bad_steps: set[int] = {1, 4, 5}

    def prepare(trainer: LemaTrainer) -> None:
        bad = next(p for n, p in trainer.model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in n)
        bad.register_hook(lambda g: g * float("inf") if trainer.global_step + 1 in bad_steps else g)
        trainers.append(trainer)

    trainers: list[LemaTrainer] = []
    settings = {**settings_of(model, rows, tmp_path / "some"), "save_steps": 2}
    result = train(settings, prepare=prepare)
    assert result.status == "finished"
    lines = read_lines(tmp_path / "some" / "metrics.jsonl")
    skipped = [line for line in lines if line.get("event") == "skipped"]
    assert result.metrics["nonfinite_steps"] == 3
    assert [line["step"] for line in skipped] == [1, 4, 5]
    assert "layer 1, mlp.up_proj.lora_B" in skipped[0]["message"]
    assert [line["step"] for line in lines if line["type"] == "train"] == list(range(1, STEPS + 1))
    state = json.loads((tmp_path / "some" / "final" / "trainer_state.json").read_text())
    assert (state["global_step"], state["lema"]["optimizer_steps"]) == (STEPS, STEPS - 3)
    assert trainers[0].optimizer_steps == STEPS - 3
    bad_steps = {5, 6, 7}
    settings["output_dir"] = str(tmp_path / "all")
    with pytest.raises(NonFiniteError, match=r"step 7: 3 steps in a row.*last good.*checkpoint-4.*layer 1, mlp"):
        train(settings, prepare=prepare)


# -- callbacks, evaluation, schedule ---------------------------------------------------------------


class Recording:
    """Any object will do; this one hears of everything."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda args, state, control, **kwargs: self.events.append(f"{name[3:]} {state.global_step}")


def test_the_order_of_events(model: Path, rows: Path, tmp_path: Path) -> None:
    recording = Recording()
    settings = {**settings_of(model, rows, tmp_path), "max_steps": 6, "save_steps": 6, "logging_steps": 3}
    train(settings, callbacks=[recording])
    assert recording.events == [
        "init_end 0", "train_begin 0", "epoch_begin 0", "step_begin 0", "step_end 1", "step_begin 1", "step_end 2",
        "step_begin 2", "step_end 3", "log 3", "log 3", "evaluate 3", "step_begin 3", "step_end 4", "step_begin 4",
        "step_end 5", "epoch_end 5", "epoch_begin 5", "step_begin 5", "step_end 6", "log 6", "log 6", "evaluate 6",
        "save 6", "save 6", "train_end 6",
    ]  # fmt: skip


def test_transformers_early_stopping_and_control(model: Path, rows: Path, tmp_path: Path) -> None:
    class Wishes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            assert args.per_device_train_batch_size == 2
            assert kwargs["model"] is not None
            control.should_save = state.global_step == 1
            control.should_training_stop = state.global_step == 7
            return control

    settings = {**settings_of(model, rows, tmp_path), "load_best_model_at_end": True}
    result = train(settings, callbacks=[EarlyStoppingCallback(10), Wishes()])
    assert result.global_step == 7
    assert (tmp_path / "checkpoint-1" / "COMPLETE").is_file()


def test_patience_and_the_best_adapter(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {1: 3.0, 2: 2.5, 3: 2.0, 4: 2.25, 5: 2.0625}
    real = LemaTrainer.evaluate

    def scripted(trainer: LemaTrainer, inputs: Any) -> tuple[float, int, int]:
        _, targets, right = real(trainer, inputs)
        return losses[trainer.global_step] * targets, targets, right

    monkeypatch.setattr(LemaTrainer, "evaluate", scripted)
    settings = {
        **settings_of(model, rows, tmp_path), "eval_steps": 1, "early_stopping_patience": 2,
        "load_best_model_at_end": True, "num_train_epochs": 6, "save_total_limit": 1, "sample_prompts": [],
    }  # fmt: skip
    result = train(settings)
    state = json.loads((tmp_path / "final" / "trainer_state.json").read_text())
    assert (result.global_step, state["best_global_step"]) == (5, 3)
    assert {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e} == losses
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(tmp_path / "checkpoint-3")
    assert train(settings, resume="auto").global_step == 5, "it stays stopped"
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.005 and is 0\.5"):
        train({**settings, "learning_rate": 0.5}, resume="auto")
    shutil.rmtree(tmp_path / "final")  # as if killed between the last evaluation's save and the end
    assert train({**settings, "save_steps": 1}, resume="auto").global_step == 5
    assert adapter_bytes(tmp_path / "final") == adapter_bytes(tmp_path / "checkpoint-3")
    with pytest.raises(ConfigError, match="need evaluation data"):
        train({**settings, "eval_size": 0, "output_dir": str(tmp_path / "none")})


def test_what_is_written(whole: Path) -> None:
    lines = read_lines(whole / "metrics.jsonl")
    steps = [line for line in lines if line["type"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    promised = {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "targets", "step_seconds", "wait_seconds",
        "bytes_read", "tokens_per_second", "peak_bytes", "time",
    }  # fmt: skip
    assert all(promised <= line.keys() for line in steps)
    assert steps[-1]["epoch"] == 2.0
    evaluations = [line for line in lines if line["type"] == "eval"]
    assert [line["step"] for line in evaluations] == [3, 6, 9, 10]
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [0, 3, 6, 9, 10]
    assert samples[0].keys() == {"step", "prompt", "text"}
    assert {"run.yaml", "data_summary.json", "timeline.json"} <= {path.name for path in whole.iterdir()}
    final = {path.name for path in (whole / "final").iterdir()}
    assert {"adapter_model.safetensors", "run.yaml", "tokenizer.json", "scheduler.json", "scaler.json"} <= final
    assert not [name for name in final if name.endswith((".bin", ".pt", ".pth", ".pkl"))], "no pickle"
    from lema.training.run_config import RunConfig

    assert RunConfig.from_yaml(whole / "final" / "run.yaml").training.eval_steps == 3


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3, 0.3])
def test_the_schedule_is_transformers_own(kind: str, warmup: float) -> None:
    from transformers import get_scheduler

    schedule = Schedule.of(TrainingConfig(lr_scheduler_type=kind, warmup_steps=warmup, num_train_epochs=2.5), 5)
    assert schedule.max_steps == 13
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, schedule.warmup_steps, schedule.max_steps)
    for step in range(1, 14):
        assert 0.5 * schedule.factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_an_optimizer_of_ones_own_keeps_its_settings(model: Path, rows: Path, tmp_path: Path) -> None:
    run = settings_of(model, rows, tmp_path, max_steps=2, eval_size=0, sample_prompts=[], warmup_steps=0)
    from lema.training.run_config import RunConfig

    config = RunConfig.from_dict(run)
    with lema.LemaModel(config.lema) as streamed:
        optimizer = torch.optim.SGD(streamed.get_trainable_parameters(), lr=0.25, momentum=0.5)
        trainer = streamed.get_trainer(optimizer)
        trainer.train(batches_of(run), training=config.training)
        assert optimizer.param_groups[0]["initial_lr"] == 0.25
        assert optimizer.param_groups[0]["weight_decay"] == 0
    steps = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["type"] == "train"]
    assert [line["learning_rate"] for line in steps] == [0.25, 0.125]


def test_the_panel_is_drawn(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from lema.training import panel

    with (tmp_path / "screen").open("w") as screen:
        console = Console(file=screen, force_terminal=True, width=100)
        view: View = LivePanel(console)
        monkeypatch.setattr(panel, "make_view", lambda plain: view)
        train(settings_of(model, rows, tmp_path / "out", num_train_epochs=1))
    shown = (tmp_path / "screen").read_text()
    for word in ("lema train", "step", "5 of 5", "tokens/s", "grad norm", "host memory", "waiting", "eval loss"):
        assert word in shown


def test_reporters_are_told(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    told: list[Any] = []
    fake = types.ModuleType("trackio")
    fake.init = lambda **kw: told.append(("init", kw["name"]))  # type: ignore[attr-defined]
    fake.log = lambda values, step: told.append((step, sorted(values)))  # type: ignore[attr-defined]
    fake.finish = lambda: told.append("finish")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = settings_of(model, rows, tmp_path / "a", max_steps=3, report_to="trackio", run_name="mine")
    train({**settings, "logging_steps": 3})
    assert told[0] == ("init", "mine")
    assert told[1] == (3, ["train/epoch", "train/grad_norm", "train/learning_rate", "train/loss"])
    assert told[-1] == "finish"
    with pytest.raises(ConfigError, match=r"pip install 'wandb>=0\.18'"):
        train({**settings, "report_to": "wandb", "output_dir": str(tmp_path / "b")})


@pytest.mark.parametrize("gradient", [float("inf"), 1e30])
def test_an_overflow_steps_nothing_and_lowers_the_scale(gradient: float) -> None:
    """Of a gradient, or of the sum of squares alone."""
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scale = LossScale(True, 4.0)
    parameter.grad = torch.full((4,), gradient)
    norm = step_optimizer(optimizer, scale, [parameter], 1.0)
    assert norm == float("inf")
    assert torch.equal(parameter.detach(), torch.ones(4))
    assert scale.scale == 2.0
