"""Two ranks, each a thread with a model of its own: they do the same, and together what one does alone."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from helpers import relative
from lema.errors import CheckpointError, RankError, ReadError
from lema.training.evaluation import evaluate
from lema.training.time_limit import TimeLimit
from ranks import train_on
from training_runs import adapter_bytes, read_lines, settings_of

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture
def settings(model: Path, rows: Path, tmp_path: Path) -> dict[str, Any]:
    """Thirteen rows in four steps, the last of one row, so that one rank has none; nine to evaluate on in three
    batches. Updates are about proportional to gradients (epsilon is 1), so that last bits stay last bits."""
    return settings_of(
        model, rows, tmp_path / "out", lora_dropout=0.0, eval_size=9, eval_steps=2, num_train_epochs=1, logging_steps=1,
        sample_prompts=[], adam_epsilon=1.0, learning_rate=0.5, warmup_steps=0, save_steps=2,
    )  # fmt: skip


def alike(adapters: list[list[torch.Tensor]]) -> bool:
    """Whether all ranks have the same adapter, to the last bit."""
    return all(torch.equal(a, b) for other in adapters[1:] for a, b in zip(adapters[0], other, strict=True))


def lines_of(settings: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """What the run's metrics say."""
    return [line for line in read_lines(Path(settings["output_dir"]) / "metrics.jsonl") if line["type"] == kind]


def test_two_ranks_are_one(settings: dict[str, Any], tmp_path: Path) -> None:
    alone = {**settings, "output_dir": str(tmp_path / "alone")}
    (one,), (expected,), _ = train_on(1, alone)
    (first, second), adapters, group = train_on(2, settings)
    assert (first.status, first.global_step) == (second.status, second.global_step) == ("finished", 4)
    assert first.global_step == one.global_step and "ranks with a gradient" in group.asked
    assert alike(adapters)
    whole = torch.cat([p.flatten() for p in expected])
    assert (torch.cat([p.flatten() for p in adapters[0]]) - whole).norm() <= 1e-5 * whole.norm()
    for kind, same, near in (
        (
            "train",
            ("step", "tokens", "targets", "rows_dropped", "rows_truncated", "learning_rate"),
            ("loss", "grad_norm"),
        ),
        ("eval", ("step", "eval_targets", "eval_token_accuracy"), ("eval_loss",)),
    ):
        ours, theirs = lines_of(settings, kind), lines_of(alone, kind)
        assert len(ours) == len(theirs) == {"train": 4, "eval": 2}[kind], "one rank writes"
        for mine, other in zip(ours, theirs, strict=True):
            assert {name: mine[name] for name in same} == {name: other[name] for name in same}
            assert all(relative(mine[name], other[name]) <= 1e-5 for name in near), (mine, other)
    states = [
        json.loads((Path(s["output_dir"]) / "final" / "trainer_state.json").read_text()) for s in (settings, alone)
    ]
    assert states[0]["num_input_tokens_seen"] == states[1]["num_input_tokens_seen"]
    assert states[0]["is_world_process_zero"] and first.metrics["eval_loss"] == second.metrics["eval_loss"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".tmp")]


def test_what_one_rank_asks_for_all_do(settings: dict[str, Any], tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert (args.process_index, args.world_size, state.is_world_process_zero) == (1, 2, False)
            control.should_save |= state.global_step == 1
            control.should_training_stop |= state.global_step == 2

    outcome, adapters, _ = train_on(2, {**settings, "save_steps": 0}, callbacks=lambda rank: [Asks()] if rank else [])
    assert [(result.status, result.global_step) for result in outcome] == [("finished", 2)] * 2
    assert alike(adapters) and (tmp_path / "out" / "checkpoint-1" / "COMPLETE").is_file()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(settings: dict[str, Any], where: str) -> None:
    def prepare(trainer: Any, rank: int) -> None:
        if rank == 0:
            return
        if where == "gradient":
            bad = trainer.lora_manager.get_trainable_parameters()[0]
            bad.register_hook(lambda g: g + math.inf if trainer.global_step == 1 else g)
            return
        loss = trainer.loss

        def not_finite(*args: Any, **kwargs: Any) -> Any:
            result = loss(*args, **kwargs)
            bad = trainer.global_step == 1 and result.gradient is not None
            return dataclasses.replace(result, parts=result.parts * math.nan) if bad else result

        trainer.loss = not_finite

    outcome, adapters, _ = train_on(2, {**settings, "max_steps": 3}, prepare=prepare)
    assert [result.metrics["nonfinite_steps"] for result in outcome] == [1, 1]
    assert alike(adapters)
    assert [line["skipped"] for line in lines_of(settings, "train")] == [False, True, False]
    assert any(line["event"] == "skipped" for line in lines_of(settings, "event"))


@pytest.mark.parametrize("main", [0, 1])
def test_a_second_signal_to_one_rank_takes_all_back(settings: dict[str, Any], tmp_path: Path, main: int) -> None:
    def prepare(trainer: Any, rank: int) -> None:
        def midway(_: torch.Tensor) -> None:
            if trainer.global_step == 1:
                twice()

        parameters = trainer.lora_manager.get_trainable_parameters()
        if rank == main:
            parameters[len(parameters) // 2].register_post_accumulate_grad_hook(midway)

    outcome, adapters, _ = train_on(2, settings, prepare=prepare, main=main)
    assert [(result.status, result.global_step) for result in outcome] == [("interrupted", 1)] * 2
    assert alike(adapters)
    resumed, adapters, _ = train_on(2, settings, resume="auto", main=main)
    assert [result.status for result in resumed] == ["finished"] * 2 and alike(adapters)
    whole = {**settings, "output_dir": str(tmp_path / "whole")}
    train_on(2, whole)
    assert adapter_bytes(tmp_path / "out" / "final") == adapter_bytes(tmp_path / "whole" / "final")


def twice() -> None:
    """To the main thread, as signals always are."""
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("after", [False, True])
def test_nobody_leaves_once_gradients_are_added_up(settings: dict[str, Any], after: bool) -> None:
    def prepare(trainer: Any, rank: int) -> None:
        add = trainer.coordinator.add

        def signalled(what: str, tensors: Any) -> None:
            mine = rank == 1 and trainer.global_step == 1 and what == "ranks with a gradient"
            if mine and not after:
                twice()
            add(what, tensors)
            if mine and after:  # the other rank may have updated its parameters by now
                twice()

        trainer.coordinator.add = signalled

    outcome, adapters, _ = train_on(2, {**settings, "eval_size": 0}, prepare=prepare, main=1)
    assert [(result.status, result.global_step) for result in outcome] == [("interrupted", 2)] * 2
    assert alike(adapters)


def test_an_evaluation_left_at_its_end_by_one_rank_counts_for_none(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_signals(*args: Any) -> dict[str, Any]:
        found = evaluate(*args)
        if threading.current_thread() is threading.main_thread():
            twice()
        return found

    monkeypatch.setattr("lema.training.loop.evaluate", then_signals)
    outcome, adapters, _ = train_on(2, {**settings, "save_steps": 0}, main=1)
    assert [(result.status, result.global_step) for result in outcome] == [("interrupted", 2)] * 2
    saved = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["lema"]["evaluated_step"] == -1 and not lines_of(settings, "eval") and alike(adapters)


def test_an_evaluation_that_one_rank_has_no_time_for(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allows(limit: TimeLimit, *kinds: str) -> bool:  # asked without a step or an evaluation between batches only
        return kinds != ("save",) or threading.current_thread().name != "rank 1"

    monkeypatch.setattr(TimeLimit, "allows", allows)
    outcome, adapters, _ = train_on(2, {**settings, "max_train_hours": 1.0, "save_steps": 0})
    assert [(result.status, result.global_step) for result in outcome] == [("stopped", 2)] * 2
    assert alike(adapters) and not lines_of(settings, "eval")
    assert (tmp_path / "out" / "checkpoint-2" / "COMPLETE").is_file()


def test_a_save_that_fails_ends_all(settings: dict[str, Any]) -> None:
    def prepare(trainer: Any, rank: int) -> None:
        def full(*_: Any, **__: Any) -> None:
            assert rank == 0, "only the first rank writes"
            raise OSError(28, "No space left on device")

        trainer.save_checkpoint = full

    outcome, _, _ = train_on(2, {**settings, "on_save_error": "stop"}, prepare=prepare)
    assert all(isinstance(error, CheckpointError) for error in outcome)
    assert str(outcome[0]) == str(outcome[1]) and "No space left" in str(outcome[1])


def test_a_rank_that_fails_ends_the_others(settings: dict[str, Any], tmp_path: Path) -> None:
    def prepare(trainer: Any, rank: int) -> None:
        def fails(_: torch.Tensor) -> None:
            if trainer.global_step == 1:
                raise ReadError("a disk that fails")

        if rank == 1:
            trainer.lora_manager.get_trainable_parameters()[0].register_post_accumulate_grad_hook(fails)

    outcome, _, _ = train_on(2, {**settings, "save_steps": 0}, prepare=prepare)
    assert isinstance(outcome[0], RankError) and "rank 1 has ended: ReadError" in str(outcome[0])
    assert isinstance(outcome[1], ReadError)
    assert (tmp_path / "out" / "checkpoint-1" / "COMPLETE").is_file(), "the last whole step is saved"


def test_a_start_that_is_refused_is_refused_on_all(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    outcome, _, _ = train_on(2, settings)
    assert "checkpoint-3 already" in str(outcome[0]) and isinstance(outcome[1], RankError)
